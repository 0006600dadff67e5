"""Targets from files, folders, patterns, ranges and lists."""

import json
import os
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from inputs import assert_refused, noise

from lightning_prompts.data.targets import Target, find_targets


def target(paths, caption=None, *, name):
    return Target(tuple(map(str, paths)), caption, name=name)


@pytest.fixture
def folder(tmp_path):
    """Return the folder `cats` with three images and files that are not images."""
    cats = tmp_path / "cats"
    cats.mkdir()
    for seed, name in enumerate(["b.JPG", "a.png", "c.webp"]):
        noise(seed=seed).save(cats / name)
    noise().save(cats / ".hidden.png")
    (cats / "notes.txt").write_text("no image")
    (cats / "inner").mkdir()
    noise().save(cats / "inner" / "deep.png")
    (cats / "folder.png").mkdir()
    return cats


def test_target_is_frozen():
    one = target(["a.png"], name="a.png")
    assert one.caption is None
    assert one.error is None
    with pytest.raises(FrozenInstanceError):
        one.name = "b"


def test_file_is_a_target(folder):
    path = folder / "a.png"
    assert find_targets([path]) == [target((path,), name="a.png")]
    assert find_targets([str(path)]) == find_targets(str(path)) == find_targets([path])


def test_missing_sources_are_refused(tmp_path):
    for name in ("a.png", "cats", "list.csv"):
        assert_refused(f"There is no file or folder '{tmp_path / name}'", find_targets, [tmp_path / name])
    assert_refused("There is no file or folder ''", find_targets, [""])
    assert_refused("No images were given", find_targets, [])


def test_folder_gives_its_images_in_order(folder):
    targets = find_targets([folder])
    assert [result.name for result in targets] == ["a.png", "b.JPG", "c.webp"]
    assert [result.paths for result in targets] == [(str(folder / name),) for name in ("a.png", "b.JPG", "c.webp")]


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "TIFF"])
def test_images_of_a_folder_are_recognized_by_suffix(tmp_path, suffix):
    (tmp_path / f"a.{suffix}").touch()
    (tmp_path / f"a{suffix}").touch()
    assert [result.name for result in find_targets([tmp_path])] == [f"a.{suffix}"]


def test_links_in_a_folder_are_followed(folder):
    (folder / "d.png").symlink_to("a.png")
    (folder / "e.png").symlink_to("e.png")
    (folder / "f.png").symlink_to("nowhere.png")
    (folder / "g.png").symlink_to("inner")
    assert [result.name for result in find_targets([folder])] == ["a.png", "b.JPG", "c.webp", "d.png"]


def test_unreadable_folder_is_refused(folder, monkeypatch):
    def forbidden(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", forbidden)
    assert_refused(f"The folder '{folder}' cannot be read (Permission denied)", find_targets, [folder])


def test_current_folder_gives_relative_paths(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert [result.paths for result in find_targets(["./"])] == [("a.png",), ("b.JPG",), ("c.webp",)]


@pytest.mark.parametrize(
    ("numbers", "names"),
    [
        ("8..11", "8 9 10 11"),
        ("08..11", "08 09 10 11"),
        ("000..001", "000 001"),
        ("1..003", "001 002 003"),
        ("2..0", "2 1 0"),
        ("0..10", " ".join(map(str, range(11)))),
        ("7..7", "7"),
    ],
)
def test_range_keeps_leading_zeros_and_direction(tmp_path, numbers, names):
    for name in names.split():
        (tmp_path / f"cat{name}.png").touch()
    result = find_targets([f"{tmp_path}/cat{{{numbers}}}.png"])
    assert [one.name for one in result] == [f"cat{name}.png" for name in names.split()]


def test_ranges_combine_with_patterns_and_ranges(tmp_path):
    for row in range(2):
        (tmp_path / f"row{row}").mkdir()
        for column in range(3):
            (tmp_path / f"row{row}" / f"{column}.png").touch()
    for source in (f"{tmp_path}/row{{0..1}}/*.png", f"{tmp_path}/row{{0..1}}/{{0..2}}.png"):
        assert [result.paths[0][-10:] for result in find_targets([source])] == [
            f"row{row}/{column}.png" for row in range(2) for column in range(3)
        ]


def test_range_with_a_gap_is_refused(folder):
    (folder / "0.png").touch()
    assert_refused(f"There is no file or folder '{folder}/1.png'", find_targets, [f"{folder}/{{0..999999999}}.png"])


def test_file_may_be_named_like_a_range(tmp_path):
    (tmp_path / "{0..1}.png").touch()
    assert [result.name for result in find_targets([tmp_path / "{0..1}.png"])] == ["{0..1}.png"]


def test_folder_without_images_is_refused(folder):
    for path in folder.glob("?.*"):
        path.unlink()
    assert_refused(f"The folder '{folder}' has no images", find_targets, [folder])


def test_pattern_gives_the_matching_images(folder):
    assert [result.name for result in find_targets([f"{folder}/[ab].*"])] == ["a.png", "b.JPG"]
    assert [result.name for result in find_targets([folder / "*"])] == ["a.png", "b.JPG", "c.webp"]
    assert [result.name for result in find_targets([f"{folder}/**/*.png"])] == ["a.png", "deep.png"]


@pytest.mark.parametrize("pattern", ["*.bmp", "*.txt", "inner*"])
def test_pattern_without_images_is_refused(folder, pattern):
    assert_refused(f"The pattern '{folder}/{pattern}' matches no images", find_targets, [f"{folder}/{pattern}"])


def test_names_may_contain_pattern_characters(tmp_path):
    strange = tmp_path / "cats [1]"
    strange.mkdir()
    noise().save(strange / "a[0].png")
    expected = [target((strange / "a[0].png",), name="a[0].png")]
    assert find_targets([strange]) == find_targets([strange / "a[0].png"]) == expected


def test_csv_gives_files_captions_and_subjects(folder):
    path = folder.parent / "list.CSV"
    path.write_text(
        'file,caption,subject\ncats/a.png,"a cat, asleep",\n\n'
        "cats/b.JPG,tom,Tom\ncats/inner/deep.png,,\ncats/c.webp,,Tom\n",
        encoding="utf-8-sig",
    )
    assert find_targets([path]) == [
        target((folder / "a.png",), "a cat, asleep", name="a.png"),
        target((folder / "b.JPG", folder / "c.webp"), "tom", name="Tom"),
        target((folder / "inner" / "deep.png",), name="deep.png"),
    ]


def test_csv_may_have_files_alone(folder):
    path = folder / "list.csv"
    path.write_text("file\nb.JPG\na.png\n")
    assert [result.name for result in find_targets([path])] == ["b.JPG", "a.png"]


def test_jsonl_gives_files_captions_and_subjects(folder):
    path = folder.parent / "list.jsonl"
    rows = [
        {"file": "cats/a.png", "caption": "one\u2028cat"},
        {"file": ["cats/b.JPG", "cats/c.webp"]},
        {"file": "cats/inner/deep.png", "subject": "Tom", "caption": None},
        {"file": ["cats/b.JPG", "cats/a.png"], "subject": "Tom"},
    ]
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert find_targets([path]) == [
        target((folder / "a.png",), "one\u2028cat", name="a.png"),
        target((folder / "b.JPG", folder / "c.webp"), name="b.JPG and 1 more"),
        target((folder / "inner" / "deep.png", folder / "b.JPG", folder / "a.png"), name="Tom"),
    ]


def test_subject_with_different_captions_has_none(folder):
    path = folder / "list.csv"
    path.write_text("file,caption,subject\na.png,one,Tom\nb.JPG,two,Tom\n")
    assert find_targets([path]) == [target((folder / "a.png", folder / "b.JPG"), None, name="Tom")]
    path.write_text("file,caption,subject\na.png,one,Tom\nb.JPG,one,Tom\n")
    assert find_targets([path])[0].caption == "one"


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("l.csv", "", "Line 1 of '{}' has no column 'file'"),
        ("l.csv", "image,caption\na.png,x\n", "Line 1 of '{}' has no column 'file'"),
        ("l.csv", 'file,"caption', "Line 1 of '{}' is not valid CSV"),
        ("l.csv", b"file,caf\xe9\na.png,x\n", "Line 1 of '{}' is not UTF-8"),
        ("l.csv", "file\nz.png\ny.png\n", "Line 2 of '{}' names '"),
        ("l.csv", "file\n", "The list '{}' names no images"),
        ("l.csv", "file,captions\na.png,x\n", "Line 2 of '{}' must have no fields but"),
        ("l.csv", 'file,caption\na.png,"x\n', "Line 2 of '{}' is not valid CSV"),
        ("l.csv", "file\n\n\nz.png\n", "Line 4 of '{}' names '"),
        ("l.csv", "file\ninner\n", "Line 2 of '{}' names '"),
        ("l.csv", b"file,caption\na.png,caf\xe9\n", "Line 2 of '{}' is not UTF-8"),
        ("l.jsonl", "\n", "The list '{}' names no images"),
        ("l.jsonl", "[" * 100_000, "Line 1 of '{}' is not valid JSON"),
        ("l.jsonl", '["a.png"]', "Line 1 of '{}' must have no fields but"),
        ("l.jsonl", '{"file": "a.png", "captoin": "x"}', "Line 1 of '{}' must have no fields but"),
        ("l.jsonl", '{"caption": "x"}', "Line 1 of '{}' has no usable 'file'"),
        ("l.jsonl", '{"file": []}', "Line 1 of '{}' has no usable 'file'"),
        ("l.jsonl", '{"file": ["a.png", 3]}', "Line 1 of '{}' has no usable 'file'"),
        ("l.jsonl", '{"file": "a.png", "caption": ["x"]}', "Line 1 of '{}' has a 'caption' or 'subject' that is not"),
        ("l.jsonl", '{"file": "a.png", "subject": 3}', "Line 1 of '{}' has a 'caption' or 'subject' that is not"),
        ("l.jsonl", '{"file": ["a.png", "z.png"]}', "Line 1 of '{}' names '"),
        ("l.jsonl", '{"file": "a\\u0000.png"}', "Line 1 of '{}' names '"),
    ],
)
def test_malformed_lists_are_refused(folder, name, content, match):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(match.format(path), find_targets, [path])
    assert_refused(match.format(path), find_targets, [folder / "c.webp", path])


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("a.png,a cat, asleep", "must have no fields but 'file'"),
        (",y", "has no usable 'file'"),
        ("z.png,y", "names '{}/z.png', which is not a file"),
        ('a.png,"x"y', "is not valid CSV"),
        ('a.png,"x', "is not valid CSV"),  # would take in all lines up to the next quote
        (b"a.png,caf\xe9", "is not UTF-8"),
        (b"a.png,\xed\xa0\x80", "is not UTF-8"),
    ],
)
@pytest.mark.parametrize("after", ["c.webp,plain", 'c.webp,"quoted, too"', 'c.webp,"two\nlines"'])
def test_broken_line_of_a_csv_leaves_the_others(folder, line, match, after):
    path = folder / "l.csv"
    line = line.encode() if isinstance(line, str) else line
    path.write_bytes(b"file,caption\n\nb.JPG,x\n" + line + b"\n" + after.encode() + b"\n")
    first, broken, last = find_targets([path])
    assert (first.name, first.caption, first.error) == ("b.JPG", "x", None)
    assert (last.name, last.error) == ("c.webp", None)
    assert last.caption == after.partition(",")[2].strip('"')
    known = (str(folder / "z.png"),) if "not a file" in match else ()
    assert (broken.paths, broken.name) == (known, f"line 4 of {path}")
    assert broken.error.startswith(f"Line 4 of '{path}' " + match.format(folder))


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (b'{"file": ', "is not valid JSON"),
        (b'{"file": "a.png", "captoin": "x"}', "must have no fields but 'file'"),
        (b'{"file": [""]}', "has no usable 'file'"),
        (b'{"file": "z.png", "subject": "Tom"}', "names '{}/z.png', which is not a file"),
        (b'{"file": "a.png", "caption": 3}', "has a 'caption' or 'subject' that is not text"),
        (b'{"file": "a.png", "caption": "caf\xe9"}', "is not UTF-8"),
    ],
)
def test_broken_line_of_a_jsonl_leaves_the_others(folder, line, match):
    path = folder / "l.jsonl"
    path.write_bytes(b'{"file": "b.JPG", "subject": "Tom"}\n\n' + line + b'\n{"file": "c.webp", "subject": "Tom"}')
    tom, broken = find_targets([path])
    assert tom == target((folder / "b.JPG", folder / "c.webp"), name="Tom")
    known = (str(folder / "z.png"),) if "not a file" in match else ()
    assert (broken.paths, broken.name) == (known, f"line 3 of {path}")
    assert broken.error.startswith(f"Line 3 of '{path}' " + match.format(folder))
    assert find_targets([path, path]) == [tom, broken]
    one, same = find_targets([path, folder / "a.png"], one_subject=True)
    assert (same, one.error, len(one.paths)) == (broken, None, 3)


def test_every_broken_line_is_reported(folder):
    (folder / "l.csv").write_text('file\nb.JPG\n"\n"\na.png\nz.png\n"\nc.webp\n')
    result = find_targets([folder / "l.csv"])
    assert [one.name.partition(" of ")[0] for one in result if one.error] == ["line 4", "line 6", "line 7"]
    assert [one.name for one in result if not one.error] == ["b.JPG", "a.png", "c.webp"]


def test_unreadable_list_is_refused(folder, monkeypatch):
    def forbidden(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    (folder / "list.csv").write_text("file\na.png\n")
    monkeypatch.setattr(Path, "read_bytes", forbidden)
    assert_refused("list.csv' cannot be read (Permission denied)", find_targets, [folder / "list.csv"])


def test_duplicates_are_kept_once(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert find_targets(["b.JPG", folder, "./a.png", folder / "inner" / ".." / "a.png"]) == [
        target((Path("b.JPG"),), name="b.JPG"),
        target((folder / "a.png",), name="a.png"),
        target((folder / "c.webp",), name="c.webp"),
    ]
    Path("list.jsonl").write_text('{"file": ["a.png", "./a.png", "b.JPG"], "caption": "x"}\n{"file": "c.webp"}')
    assert [len(result.paths) for result in find_targets(["list.jsonl", "list.jsonl"])] == [2, 1]


def test_duplicate_brings_its_caption(folder):
    (folder / "list.csv").write_text("file,caption\na.png,a cat\n")
    captions = [result.caption for result in find_targets([folder, folder / "list.csv"])]
    assert captions == ["a cat", None, None]


def test_one_subject_joins_all_images(folder):
    paths = tuple(folder / name for name in ("a.png", "b.JPG", "c.webp"))
    assert find_targets([folder], one_subject=True) == [target(paths, name="cats")]
    assert find_targets([*paths, paths[0]], one_subject=True) == [target(paths, name="cats")]
    deep = folder / "inner" / "deep.png"
    assert find_targets([folder, deep], one_subject=True) == [target((*paths, deep), name="a.png and 3 more")]
    assert find_targets([deep], one_subject=True) == [target((deep,), name="deep.png")]


def test_one_subject_joins_overlapping_groups(folder):
    (folder / "list.csv").write_text("file,caption,subject\na.png,x,Tom\nb.JPG,x,Tom\na.png,,Ann\n")
    whole = target((folder / "a.png", folder / "b.JPG"), "x", name="cats")
    assert find_targets([folder / "list.csv"], one_subject=True) == [whole]
