"""Completion of commands, options and file names in chat."""

from minigpt4_jax.cli.line_editing import completions

COMMANDS = ("image", "reset", "retry", "set")
OPTIONS = ("temperature", "top_k", "top_p")


def complete(line):
    """The lines that TAB makes of a line."""
    begin = max(line.rfind(" "), line.rfind("\t")) + 1
    return [line[:begin] + word for word in completions(line, begin, COMMANDS, OPTIONS)]


def test_commands_and_options():
    assert complete("/re") == ["/reset ", "/retry "]
    assert complete("/set to") == ["/set top_k=", "/set top_p="]
    assert complete("/set top_k=3 te") == ["/set top_k=3 temperature="]
    assert complete("") == complete("what is") == complete("/nothing") == []


def test_file_names(tmp_path, monkeypatch):
    for name in ("a.png", "my cat.png", "my dog.png"):
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    at = f"/image {tmp_path}"
    assert complete(f"{at}/a") == [f"{at}/a.png"]
    assert complete(f"{at}/fo") == [f"{at}/folder/"]
    assert complete(f"{at}/my ") == [f"{at}/my cat.png", f"{at}/my dog.png"]
    assert complete(f"{at}/my c") == [f"{at}/my cat.png"]
    assert complete(f"{at}/a.png {tmp_path}/fo") == [f"{at}/a.png {tmp_path}/folder/"]
    assert complete(f'/image "{tmp_path}/my c') == [f'/image "{tmp_path}/my cat.png"']
    assert complete(f'/image "{tmp_path}/a') == [f'/image "{tmp_path}/a.png"']
    assert complete(f"/image '{tmp_path}/my c") == [f"/image '{tmp_path}/my cat.png'"]
    assert complete(f"{at}/my\\ d") == [f"{at}/my\\ dog.png"]
    assert complete(f"{at}/a.png {tmp_path}/my\\ d") == [f"{at}/a.png {tmp_path}/my\\ dog.png"]
    (tmp_path / "it's a cat.png").touch()
    assert complete(f"{at}/it's a") == [f"{at}/it's a cat.png"]
    monkeypatch.chdir(tmp_path)  # a.png and others must not be taken for what is quoted
    assert complete("/image 'no a") == complete("/image no\\ a") == []
    assert complete("/image my\\ c") == ["/image my\\ cat.png"]
    assert complete("/image ~/a") == [f"{at}/a.png"]
    assert complete("/image ~/my d") == ["/image ~/my dog.png"]
