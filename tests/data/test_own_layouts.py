"""Own data in the layouts of other programs: CSV, imagefolder, messages with roles, odd file names."""

import json

import pytest
from PIL import Image

from minigpt4_jax.data.json_records import Example, read_sources
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.chat_templates import IMAGE_SLOT


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png", "deep/er/c.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    return tmp_path


def write(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def lines(*rows):
    return "\n".join(map(json.dumps, rows))


def images_of(folder, *names):
    return tuple(str(folder / name) for name in names)


def caption(folder, name, text):
    return Example(images_of(folder, name), (), (text,))


# --- tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.csv", 'image,caption\na.png,"A dog, asleep"\nb.png,Cats\n'),
        ("rows.CSV", '\ufeffImage,Text,id\r\na.png,"A dog, asleep",1\r\n\r\nb.png,Cats,2\r\n'),
        ("rows.tsv", "caption\tfile_name\nA dog, asleep\ta.png\nCats\tb.png"),
        ("rows.csv", "filename;description\na.png;A dog, asleep\nb.png;Cats\n"),
    ],
)
def test_captions_in_a_table(folder, name, text):
    expected = [caption(folder, "a.png", "A dog, asleep"), caption(folder, "b.png", "Cats")]
    assert read_sources(write(folder, name, text)) == expected


def test_questions_and_several_images_in_a_table(folder):
    text = (
        "images,question,answer,caption\n"
        'a.png;b.png,Same?,"No,\nnot at all",\n'
        '"[""b.png""]",What?,A cat,\n'
        ",Why?,So,\n"
        "a.png,,,A dog\n"
    )
    assert read_sources(write(folder, "rows.csv", text)) == [
        Example(
            images_of(folder, "a.png", "b.png"),
            (f"{IMAGE_SLOT}{IMAGE_SLOT} Same?",),
            ("No,\nnot at all",),
        ),
        Example(images_of(folder, "b.png"), (f"{IMAGE_SLOT} What?",), ("A cat",)),
        Example((), ("Why?",), ("So",)),
        caption(folder, "a.png", "A dog"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"has the columns \(none\); expected the first line to name"),
        ("a.png,A dog\n", r"the columns 'a\.png', 'A dog'; expected"),
        ("image,question\na.png,What?\n", "the columns 'image', 'question'; expected"),
        ("image,caption\na.png,A dog, asleep\n", "line 2: has 3 cells; expected 2.*quotes"),
        ("image,caption\na.png,x\nb.png\n", "line 3: has 1 cells; expected 2"),
        ('image,caption\na.png,"x\n', "is not CSV"),
        ("image,caption\n,x\n", 'line 2: a caption needs an "image"'),
        ("image,caption\na.png,\n", "line 2: has the keys 'image'"),
        ("image,image_path,caption,text\na.png,a.png,x,y\n", ""),
        ("image,caption,caption\na.png,x,y\n", "several columns for caption"),
        ("images,caption\n[1,x\n", 'line 2: "images" is not a JSON list'),
        ("images,caption\n[a.png],x\n", 'line 2: "images" is not a JSON list'),
        ("image,caption\n", "the dataset is empty"),
    ],
)
def test_wrong_tables(folder, text, message):
    path = write(folder, "rows.csv", text)
    if not message:  # names of other programs beside the known ones are other columns
        assert read_sources(path) == [caption(folder, "a.png", "x")]
        return
    with pytest.raises(UserError, match=message) as e:
        read_sources(path)
    assert "\n" not in str(e.value) and "rows.csv" in str(e.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.csv", "sep=;\nimage;caption\na.png;A dog, asleep\n"),  # Excel
        ("rows.csv", 'image, caption\na.png , "A dog, asleep"\n'),
        ("rows.csv", 'images,caption\n"[\'a.png\']","A dog, asleep"\n'),  # pandas
        ("rows.tsv", 'image,caption\na.png,"A dog, asleep"\n'),
        ("rows.csv", "caption|image\nA dog, asleep| a.png\n"),
    ],
)
def test_tables_as_other_programs_write_them(folder, name, text):
    assert read_sources(write(folder, name, text)) == [caption(folder, "a.png", "A dog, asleep")]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("rows.csv", "image,caption\na.png,x\n".encode("utf-16"), "is UTF-16.*iconv"),
        ("rows.csv", "image,caption\na.png,ä\n".encode("cp1252"), "UTF-8.*WINDOWS-1252"),
        ("rows.csv", b"PK\x03\x04\x14\0", "an Excel file.*save it as CSV"),
        ("rows.jsonl", b"\x1f\x8b\x08\0", "compressed by gzip.*unpack"),
        ("rows.json", b"PAR1\x15", "Parquet.*ends in .parquet"),
    ],
)
def test_files_of_other_formats_are_named(folder, name, data, message):
    (folder / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_sources(folder / name)


# --- nothing of a row is lost ---------------------------------------------------------------------

QA = {"question": "q", "answer": "a"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"img": "a.png", **QA}, 'line 1: has no "image", but "img" is \'a.png\'; name the key "image"'),
        ({"image_path": "deep/er/c.JPG", **QA}, '"image_path" is'),
        ({"photo": "a.png", "caption": "x"}, '"photo" is'),
        ({"file": "a.webp", "messages": [{"role": "user", "content": "q"},
                                         {"role": "assistant", "content": "a"}]}, '"file" is'),
        ({"image": "a.png", "caption": "x", **QA}, "has 'question' and 'caption'; expected one"),
        ({"image": "a.png", "caption": "x", "conversations": [{"from": "human", "value": "q"},
            {"from": "gpt", "value": "a"}]}, "has 'conversations' and 'caption'; expected one"),
        ({"image": "https://a.b/c.png", **QA}, "line 1: the image is 'https://a.b/c.png'.*URLs are not"),
        ({"image": "data:image/png;base64,AA", "caption": "x"}, "line 1: the image is 'data:"),
        ({"image": "a.png", "system": "Be brief.", "caption": "x"}, "a caption has no place for"),
        ({"image": "a.png", "system": 3, **QA}, '"system" is int 3; expected a string'),
        ({"image": "a.png", "system": "x", "messages": [{"role": "system", "content": "y"},
            {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
         "another system message"),
    ],
)  # fmt: skip
def test_what_would_be_ignored_is_refused(folder, row, message):
    with pytest.raises(UserError, match=message):
        read_sources(write(folder, "rows.jsonl", lines(row)))


def test_a_text_may_end_like_a_file_name(folder):
    row = {"question": "Which file?", "answer": "a.png", "source": "see page 3 of b.png"}
    (example,) = read_sources(write(folder, "rows.jsonl", lines(row)))
    assert example == Example((), ("Which file?",), ("a.png",))


@pytest.mark.parametrize("texts", [QA, {"messages": [
    {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}])  # fmt: skip
def test_the_key_system_is_the_system_message(folder, texts):
    row = {"image": "a.png", "system": "Be brief.", **texts}
    (example,) = read_sources(write(folder, "rows.jsonl", lines(row)))
    assert example.system == "Be brief."
    write(folder, "rows.csv", "image,system,question,answer\na.png,Be brief.,q,a\n")
    assert read_sources(folder / "rows.csv")[0].system == "Be brief."


def test_file_addresses_are_paths(folder):
    row = {"image": (folder / "a.png").as_uri(), **QA}
    (example,) = read_sources(write(folder, "rows.jsonl", lines(row)))
    assert example.images == images_of(folder, "a.png")


def test_a_folder_with_several_lists_needs_the_name_of_one(folder):
    write(folder, "metadata.jsonl", lines({"file_name": "a.png", "text": "x"}))
    write(folder, "metadata.csv", "file_name,text\na.png,y\n")
    with pytest.raises(UserError, match=r"has metadata.jsonl and metadata.csv; name the file"):
        read_sources(folder)


def test_a_folder_with_rows_under_another_name_says_which(folder):
    write(folder, "train.jsonl", lines({"image": "a.png", "caption": "x"}))
    with pytest.raises(UserError, match=r"name one of those in it: \S+/train.jsonl$"):
        read_sources(folder)


# --- imagefolder ---------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["text", "caption"])
def test_imagefolder(folder, key):
    rows = [{"file_name": "a.png", key: "A dog"}, {"file_name": "deep/er/c.png", key: "Cats"}]
    expected = [caption(folder, "a.png", "A dog"), caption(folder, "deep/er/c.png", "Cats")]
    path = write(folder, "metadata.jsonl", lines(*rows))
    assert read_sources(folder) == read_sources(path) == expected
    path.unlink()
    write(folder, "metadata.csv", f"file_name,{key}\na.png,A dog\ndeep/er/c.png,Cats\n")
    assert read_sources(folder) == expected


def test_imagefolder_with_questions_and_several_images(folder):
    row = {"file_names": ["a.png", "b.png"], "question": "Same?", "answer": "No"}
    write(folder, "metadata.jsonl", lines(row))
    (example,) = read_sources(folder)
    assert example.images == images_of(folder, "a.png", "b.png")


def test_folder_of_splits_is_named(folder):
    (folder / "train").mkdir()
    write(folder, "train/metadata.csv", "file_name,text\n../a.png,x\n")
    with pytest.raises(UserError, match=r"name one of those in it: \S+/train$"):
        read_sources(folder)


# --- messages ------------------------------------------------------------------------------------


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def text(value):
    return {"type": "text", "text": value}


IMAGE = {"type": "image"}
A, B = {"type": "image", "image": "a.png"}, {"type": "image_url", "image_url": {"url": "b.png"}}


@pytest.mark.parametrize("key", ["messages", "conversations"])
@pytest.mark.parametrize(
    ("images", "turns", "names", "questions", "answers"),
    [
        (["a.png"], [user("What?"), assistant("Red")], ["a.png"], ["{} What?"], ["Red"]),
        ("a.png", [user("<image>\nWhat?"), assistant([text("Red")])], ["a.png"], ["{} What?"],
         ["Red"]),
        (["a.png", "b.png"], [user([IMAGE, IMAGE, text("Same?")]), assistant("No")],
         ["a.png", "b.png"], ["{}{} Same?"], ["No"]),
        (["a.png", "b.png"],
         [user([IMAGE, text("What?")]), assistant("Red"), user([text("This?"), IMAGE]),
          assistant("Blue")],
         ["a.png", "b.png"], ["{} What?", "{} This?"], ["Red", "Blue"]),
        (None, [user([B, text("What?"), text("Say.")]), assistant("Red"), user("Sure?"),
                assistant("Yes")],
         ["b.png"], ["{} What? Say.", "Sure?"], ["Red", "Yes"]),
        (["b.png"], [user([A, text("or"), IMAGE, text("?")]), assistant("No")],
         ["a.png", "b.png"], ["{} or {} ?"], ["No"]),
        ([], [user([text("Why?")]), assistant("So")], [], ["Why?"], ["So"]),
        ([], [{"role": "system", "content": ""}, user("Why?"), assistant("So")], [], ["Why?"],
         ["So"]),
    ],
)  # fmt: skip
def test_messages(folder, key, images, turns, names, questions, answers):
    path = write(folder, "rows.jsonl", lines({"images": images, key: turns}))
    (example,) = read_sources(path)
    assert example.images == images_of(folder, *names)
    assert list(example.questions) == [q.replace("{}", IMAGE_SLOT) for q in questions]
    assert list(example.answers) == answers


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "system", "content": "Be kind"}, user("a"), assistant("b")]},
        {"messages": [{"role": "system", "content": [text("Be kind")]}, user("a"), assistant("b")]},
        {"conversations": [{"from": "system", "value": "Be kind"}, {"from": "human", "value": "a"},
                           {"from": "gpt", "value": "b"}]},
    ],
)  # fmt: skip
def test_system_messages(folder, row):
    (example,) = read_sources(write(folder, "rows.jsonl", lines(row)))
    assert example == Example((), ("a",), ("b",), "Be kind")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "system", "content": [IMAGE]}, user("a"), assistant("b")]},
         'turn 1 of "messages": the system message has images'),
        ({"messages": [{"role": "system", "content": 3}, user("a"), assistant("b")]},
         'turn 1 of "messages": the system message is int 3'),
        ({"conversations": [{"from": "system", "value": "Be kind"}]}, '"conversations" needs a list'),
        ({"messages": [{"role": "system", "content": "S"}, user("a"), user("b")]}, "turn 3 .*'user'"),
        ({"messages": [user("a")]}, '"messages" needs .* a list of 1'),
        ({"messages": [assistant("a"), user("b")]}, 'turn 1 .*"role": "user".*got \'assistant\''),
        ({"messages": [user("a"), {"role": "tool", "content": "b"}]}, "turn 2 .*got 'tool'"),
        ({"messages": [user("a"), {"role": "assistant"}]}, 'turn 2 .*"content"'),
        ({"messages": [user(None), assistant("b")]}, 'turn 1 .*"content" is null'),
        ({"messages": [user([]), assistant("b")]}, 'turn 1 .*"content" is empty'),
        ({"messages": [user(["a"]), assistant("b")]}, "turn 1 .*part 1: expected"),
        ({"messages": [user([{"type": "audio"}]), assistant("b")]}, "part 1: expected"),
        ({"messages": [user("a"), assistant([A])]}, "turn 2 .*an answer has images"),
        ({"messages": [user([IMAGE, text("a")]), assistant("b")]}, "1 image marks .*0 images"),
        ({"images": ["a.png", "b.png"], "messages": [user([A, IMAGE]), assistant("b")]},
         "1 image parts without a path and 2 images"),
        ({"messages": [user([{"type": "image_url", "image_url": {"url": "https://a/b.png"}}]),
                       assistant("b")]}, r"part 1: .*https://a/b\.png.*URLs are not read"),
        ({"messages": [user("a"), assistant("b")], "conversations": []}, "expected one of them"),
        ({"image": "a.png", "images": ["b.png"], "caption": "x"}, "'image' and 'images'; expected"),
    ],
)  # fmt: skip
def test_wrong_messages(folder, row, message):
    with pytest.raises(UserError, match=f"line 1.*{message}") as e:
        read_sources(write(folder, "rows.jsonl", lines(row)))
    assert "\n" not in str(e.value)


# --- files under another name, paths of Windows --------------------------------------------------


@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_in_a_file_of_lines(folder, indent):
    rows = [{"image": "a.png", "caption": "A dog"}, {"image": "b.png", "caption": "Cats"}]
    expected = [caption(folder, "a.png", "A dog"), caption(folder, "b.png", "Cats")]
    path = write(folder, "rows.jsonl", json.dumps(rows, indent=indent))
    assert read_sources(path) == expected
    path.write_text(json.dumps(rows, indent=indent)[:-3])
    with pytest.raises(UserError, match=r"rows\.jsonl: is not JSON at line"):
        read_sources(path)


def test_lines_in_a_file_of_one_list(folder):
    rows = [{"image": "a.png", "caption": "A dog"}, {"image": "b.png", "caption": "Cats"}]
    path = write(folder, "rows.json", lines(*rows) + "\n")
    assert [example.answers for example in read_sources(path)] == [("A dog",), ("Cats",)]
    path.write_text(lines(*rows) + "\n{")
    with pytest.raises(UserError, match="line 3: is not JSON"):
        read_sources(path)


def test_backslashes_in_paths(folder):
    path = write(folder, "rows.jsonl", lines({"image": "deep\\er\\c.png", "caption": "x"}))
    assert read_sources(path) == [caption(folder, "deep/er/c.png", "x")]
    Image.new("RGB", (4, 4)).save(folder / "odd\\name.png")
    path = write(folder, "rows.jsonl", lines({"image": "odd\\name.png", "caption": "x"}))
    assert read_sources(path) == [caption(folder, "odd\\name.png", "x")]
