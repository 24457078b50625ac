"""Models given by their Hugging Face id, downloaded from a server on this machine."""

import errno
import json
import socket
import threading
from pathlib import Path

import pytest
from helpers.hub_server import files_in, use_endpoint
from helpers.user_errors import refused

from minigpt4_jax.storage.hub import (
    HubId,
    fetch_checkpoint,
    fetch_language_model,
    fetch_model_directory,
    fetch_tokenizer,
    input_path,
    parse_hub_id,
    source_record,
    source_uri,
)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
LLM_FILES = {
    "config.json": b"config",  # contents differ, as equal ones are downloaded once
    "generation_config.json": b"generation",
    "tokenizer.json": b"tokenizer",
    "chat_template.jinja": b"template",
    "model.safetensors": b"weights" * 1000,
}
UNUSED_FILES = {
    "README.md": b"readme",
    ".gitattributes": b"lfs",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"twice",
    "original/config.json": b"other",
    "onnx/model.safetensors": b"onnx",
    "flax_model.msgpack": b"flax",
}


def fetch(hub_id: str):
    return fetch_language_model("--llm", hub_id, TOKENIZER_FILES)


def refusal(hub_id: str, function=fetch) -> str:
    """The one line with which a download is refused."""
    return refused(function, hub_id)


# --- ids ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubId("org/name")),
        ("hf://org/name", HubId("org/name")),
        ("hf:/org/name@v1.0", HubId("org/name", "v1.0")),  # as pathlib writes hf://
        ("org/name@refs/pr/3", HubId("org/name", "refs/pr/3")),
        ("org/Llama-3.2-1B@main", HubId("org/Llama-3.2-1B", "main")),
        ("org/name/q4.gguf", HubId("org/name", None, "q4.gguf")),
        ("org/name@dev/sub/q4.gguf", HubId("org/name", "dev", "sub/q4.gguf")),
        ("org/name:Q4_K_M", HubId("org/name", None, None, "Q4_K_M")),
        ("org/name@dev:Q8_0", HubId("org/name", "dev", None, "Q8_0")),
        ("name", None),
        ("/org/name", None),
        ("./org/name", None),
        ("../name", None),
        ("~/name", None),
        ("org/", None),
        ("org/name/", None),
        ("org/sub/name", None),
        ("org/na--me", None),
        ("weights/model.gguf", None),
        ("model.gguf", None),
        ("gs://bucket/name", None),
        ("gs:/bucket/name", None),
        ("s3://bucket/name", None),
        ("org/name with spaces", None),
    ],
)
def test_what_is_an_id(text, expected):
    assert parse_hub_id(text) == expected
    if expected is not None and not text.startswith("hf:"):
        assert str(expected) == text


def test_local_paths_are_preferred(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/name").mkdir(parents=True)
    assert parse_hub_id("org/name") is None
    assert parse_hub_id("hf://org/name") == HubId("org/name")


def test_a_dot_keeps_a_missing_path_from_being_an_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_hub_id(input_path("./org/name")) is None
    assert parse_hub_id(input_path("org/name")) == HubId("org/name")
    (tmp_path / "org/name").mkdir(parents=True)
    assert input_path("./org/name") == Path("org/name")


def test_a_malformed_uri_is_refused():
    assert "expected hf://ORG/NAME" in refusal("hf://name", parse_hub_id)


# --- which files ----------------------------------------------------------------------------------


def test_only_the_needed_files_are_downloaded(hub):
    commit = hub.publish("org/llm", LLM_FILES | UNUSED_FILES)
    folder = fetch("org/llm")
    assert folder.name == commit
    assert files_in(folder) == LLM_FILES
    assert hub.downloaded() == sorted(LLM_FILES)


def test_of_sharded_weights_the_files_in_the_index(hub):
    index = json.dumps({"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}})
    parts = {"part-1.safetensors": b"1", "part-2.safetensors": b"2"}
    files = {"config.json": b"{}", "model.safetensors.index.json": index.encode(), **parts}
    hub.publish("org/llm", files | UNUSED_FILES)
    assert files_in(fetch("org/llm")) == files
    hub.publish("org/cut", {k: v for k, v in files.items() if k != "part-2.safetensors"})
    assert "lacks part-2.safetensors" in refusal("org/cut")
    hub.publish("org/bad", files | {"model.safetensors.index.json": b"<html>"})
    assert "model.safetensors.index.json is damaged" in refusal("org/bad")


def test_pickles_only_without_safetensors(hub):
    files = {"config.json": b"{}", "tokenizer.json": b"{}", "pytorch_model.bin": b"pickle"}
    hub.publish("org/llm", files | {"training_args.bin": b"x", "rust_model.ot": b"y"})
    assert files_in(fetch("org/llm")) == files


def test_tokenizer_only(hub):
    hub.publish("org/llm", LLM_FILES)
    fetch_tokenizer("--tokenizer", "org/llm", TOKENIZER_FILES)
    assert hub.downloaded() == ["chat_template.jinja", "config.json", "tokenizer.json"]


GGUF_FILES = {
    "m-Q4_K_M.gguf": b"GGUF4",
    "m-Q8_0.gguf": b"GGUF8",
    "m-IQ4_K_M.gguf": b"GGUFi",
    "big/m-F16-00001-of-00002.gguf": b"GGUF1",
    "big/m-F16-00002-of-00002.gguf": b"GGUF2",
    "mmproj-m-Q8_0.gguf": b"GGUFp",
}


@pytest.mark.parametrize("hub_id", ["org/gguf/m-Q4_K_M.gguf", "org/gguf:Q4_K_M", "org/gguf:q4_k_m"])
def test_one_gguf_file(hub, hub_id):
    hub.publish("org/gguf", GGUF_FILES | {"config.json": b"{}"})
    assert fetch(hub_id).read_bytes() == b"GGUF4"
    assert hub.downloaded() == ["m-Q4_K_M.gguf"]


@pytest.mark.parametrize(
    ("hub_id", "message"),
    [
        ("org/gguf", "has 4 GGUF files; name one, or its type as in org/gguf:Q4_K_M"),
        (
            "org/gguf:Q5_K_M",
            "0 GGUF files match 'Q5_K_M'; it has big/m-F16-00001-of-00002.gguf, m-IQ4",
        ),
        ("org/gguf:F16", "is one of 2 parts"),
        ("org/gguf/other.gguf", "has no file other.gguf; it has big/m-F16"),
    ],
)
def test_which_gguf_file_is_unclear(hub, hub_id, message):
    hub.publish("org/gguf", GGUF_FILES)
    assert message in refusal(hub_id)
    assert hub.downloads == []


def test_the_only_gguf_file_needs_no_name(hub):
    hub.publish("org/gguf", {"README.md": b"x", "m.gguf": b"GGUF"})
    assert fetch("org/gguf").name == "m.gguf"


def test_a_checkpoint_file(hub):
    hub.publish("org/vision", {"eva_vit_g.pth": b"PK", "other.pth": b"PK"})
    assert fetch_checkpoint("--vision", "org/vision/eva_vit_g.pth").read_bytes() == b"PK"
    assert hub.downloaded() == ["eva_vit_g.pth"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is not a language model in a format that can be converted"),
        ({"README.md": b"x"}, "it has README.md"),
        ({"config.json": b"{}", "model.onnx": b"x"}, "it has config.json, model.onnx"),
    ],
)
def test_a_repository_without_usable_files(hub, files, message):
    hub.publish("org/other", files)
    assert message in refusal("org/other")
    assert hub.downloads == []


def test_a_language_model_is_not_a_model_directory(hub):
    hub.publish("org/llm", LLM_FILES)
    assert "convert build --llm=org/llm" in refusal("org/llm", fetch_model_directory)
    assert "model directory org/llm:Q4 is a file" in refusal("org/llm:Q4", fetch_model_directory)


# --- revisions and the cache ----------------------------------------------------------------------


def test_revisions(hub):
    old = hub.publish("org/llm", LLM_FILES)
    new = hub.publish("org/llm", LLM_FILES | {"model.safetensors": b"new"})
    hub.publish("org/llm", LLM_FILES | {"model.safetensors": b"branch"}, branch="v2.0")
    assert (fetch("org/llm") / "model.safetensors").read_bytes() == b"new"
    assert (fetch("org/llm@v2.0") / "model.safetensors").read_bytes() == b"branch"
    assert fetch(f"org/llm@{old}").name == old
    assert fetch(f"hf://org/llm@{new}").name == new
    assert f"{hub.endpoint}/org/llm has no revision v3" in refusal("org/llm@v3")
    hub.publish("org/llm", {"m.gguf": b"GGUF"}, branch="gguf")
    assert fetch("org/llm@gguf").name == "m.gguf"  # its own list of files decides
    index = {"weight_map": {"a": "part-1.safetensors"}}
    files = {"config.json": b"{}", "part-1.safetensors": b"1"}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    hub.publish("org/llm", files, branch="sharded")
    assert files_in(fetch("org/llm@sharded")) == files  # and its own index
    del hub.refs["org/llm"]["gguf"]
    assert "has no revision gguf" in refusal("org/llm@gguf")  # not the cached one of that name


def test_what_is_in_the_cache_is_not_downloaded_again(hub, offline):
    hub.publish("org/llm", LLM_FILES)
    first = fetch("org/llm")
    hub.downloads.clear()
    assert fetch("org/llm") == first and hub.downloads == []
    hub.publish("org/llm", LLM_FILES | {"model.safetensors": b"new"})
    offline()
    hub.requests.clear()
    assert fetch("org/llm") == first == fetch(f"org/llm@{first.name}")
    assert hub.requests == []
    assert "HF_HUB_OFFLINE forbids" in refusal("org/llm@v2") and "HF_HUB" in refusal("org/other")


def test_the_cache_is_used_without_a_network_and_says_so(hub, offline, monkeypatch, caplog):
    hub.publish("org/llm", LLM_FILES)
    first = fetch("org/llm")
    assert not caplog.messages
    use_endpoint(monkeypatch, endpoint := closed_port())
    assert fetch("org/llm") == first
    (message,) = caplog.messages
    assert message.startswith(f"--llm org/llm: {endpoint} cannot be asked (ConnectError: ")
    assert f"using hf://org/llm@{first.name} of the cache, which may be out of date" in message
    offline()
    caplog.clear()
    assert fetch("org/llm") == first and not caplog.messages  # as the user has asked for


def test_what_the_cache_lacks_is_told_as_such(hub, offline):
    hub.publish("org/llm", LLM_FILES)
    fetch_tokenizer("--tokenizer", "org/llm", TOKENIZER_FILES)
    offline()
    assert "in a format that can be converted: expected config.json" in (line := refusal("org/llm"))
    assert "(in the cache: the hub cannot be reached, " in line


def test_a_server_that_never_answers(hub, monkeypatch):
    """A firewall that drops packets: the cache is used, or the error comes after the timeout."""
    from huggingface_hub import constants

    hub.publish("org/llm", LLM_FILES)
    first = fetch("org/llm")
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections only
        use_endpoint(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        (closing := threading.Timer(5, silent.close)).start()  # fail rather than hang
        assert fetch("org/llm") == first
        assert "ReadTimeout: timed out; check the network" in refusal("org/other")
        closing.cancel()


def test_an_interrupted_download_is_resumed(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
    hub.publish("org/llm", LLM_FILES)
    hub.cut_after["model.safetensors"] = 2500
    assert files_in(fetch("org/llm")) == LLM_FILES
    ranges = [r for file, r in hub.downloads if file == "model.safetensors"]
    assert ranges == [None, "bytes=2500-"]


def test_a_failed_download_leaves_nothing_half_used(hub, monkeypatch):
    hub.publish("org/llm", LLM_FILES)
    hub.failing.add("chat_template.jinja")
    assert f"{hub.endpoint} answered with an error: " in refusal("org/llm") or "500" in refusal(
        "org/llm"
    )
    with monkeypatch.context() as patch:
        use_endpoint(patch, closed_port())
        message = refusal("org/llm")
        assert "is incomplete" in message and "run it again with a network" in message
    hub.failing.clear()
    assert files_in(fetch("org/llm")) == LLM_FILES
    assert hub.downloaded() == sorted(LLM_FILES)  # each once


def test_where_a_file_came_from(hub):
    commit = hub.publish("org/llm", LLM_FILES)
    folder = fetch("org/llm")
    uri = f"hf://org/llm@{commit}"
    assert source_uri(folder) == uri
    assert source_uri(folder / "model.safetensors") == f"{uri}/model.safetensors"
    assert parse_hub_id(f"{uri}/model.safetensors") == HubId("org/llm", commit, "model.safetensors")
    assert source_uri("/data/models/llm") is None
    assert source_record([folder / "config.json"]) == {"hub": f"{uri}/config.json"}
    assert source_record([folder / "config.json", folder / "model.safetensors"]) == {"hub": uri}
    assert source_record(["/data/x"]) == {}


# --- refusals -------------------------------------------------------------------------------------


def closed_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}"


def test_no_such_repository(hub, monkeypatch):
    message = "there is no such path here and no such model on http://127.0.0.1"
    assert f"--llm org/none: {message}" in refusal("org/none")  # status 401
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert message in refusal("org/none")  # status 404


def test_a_private_repository_needs_a_token(hub, monkeypatch):
    hub.publish("org/private", LLM_FILES)
    hub.token = "hf_secret"
    assert "for a private one set HF_TOKEN" in refusal("org/private")
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    assert f"{hub.endpoint} refuses your token (HF_TOKEN or" in refusal("org/private")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert files_in(fetch("org/private")) == LLM_FILES


def test_a_gated_repository(hub):
    hub.publish("org/gated", LLM_FILES)
    hub.gated.add("org/gated")
    assert f"accept the terms at {hub.endpoint}/org/gated, then set HF_TOKEN" in refusal(
        "org/gated"
    )


def test_no_network(hub, monkeypatch):
    use_endpoint(monkeypatch, closed_port())
    line = refusal("runs/stage1")
    assert "there is no such path here, and it cannot be downloaded from http://127.0.0.1" in line
    assert "Connection refused; check the network, or give a local path" in line


def test_a_disk_that_is_too_small_is_noticed_before_the_download(hub):
    hub.publish("org/llm", LLM_FILES)
    hub.sizes["model.safetensors"] = 10**17
    line = refusal("org/llm")
    assert "the disk is full" in line and "the download needs 100000000.0 GB; set HF_HOME" in line
    assert hub.downloads == []


def test_space_is_needed_for_what_is_downloaded_only(hub):
    hub.publish("org/llm", LLM_FILES | UNUSED_FILES)
    hub.sizes["onnx/model.safetensors"] = 10**17
    first = fetch("org/llm")
    hub.sizes["model.safetensors"] = 10**17  # is in the cache
    assert fetch("org/llm") == first


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full: make room in"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full: make room in"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot write to the cache"),
        (RuntimeError("Xet: no space left"), "the disk is full: make room in"),
        (OSError("Consistency check failed"), "cannot be downloaded"),
    ],
)
def test_a_cache_that_cannot_be_written(hub, monkeypatch, error, message):
    import huggingface_hub

    def fail(*_, **__):
        raise error

    hub.publish("org/llm", LLM_FILES)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert message in refusal("org/llm")
