import io
import json
import os
import random
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from lightning_prompts.commands.main import main
from lightning_prompts.data import shards
from lightning_prompts.data.images import load_image
from lightning_prompts.data.targets import Target, find_targets
from lightning_prompts.errors import UserError


def pixels(seed):
    return np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def encode(seed, kind="png"):
    buffer = io.BytesIO()
    Image.fromarray(pixels(seed)).save(buffer, kind)
    return buffer.getvalue()


def archive(path, members, **options):
    """Write pairs of name and bytes, or a TarInfo alone.

    Return where the header, the data and the padding of each end.
    """
    offsets = []
    with open(path, "wb") as file, tarfile.open(fileobj=file, mode="w", **options) as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if data is not None:
                info.size, info.mtime = (
                    len(data),
                    time.time(),
                )  # not whole seconds, so PAX needs a header of its own
            tar.addfile(info, io.BytesIO(data or b""))
            end = file.tell()
            offsets.append((end - -(-info.size // 512) * 512, end - -info.size % 512, end))
    return offsets


def write_samples(path, samples, **options):
    """Write samples as WebDataset's ShardWriter does, with the fields of each in the order of their names."""
    members = [(f"{key}.{kind}", fields[kind]) for key, fields in samples.items() for kind in sorted(fields)]
    return archive(path, members, **options)


def write_three_samples(path, **options):
    return write_samples(
        path,
        {f"{i:04}": {"txt": f"caption {i}".encode() * 50, "png": encode(i), "cls": b"7"} for i in range(3)},
        **options,
    )


def is_one_sentence(text):
    return text.endswith(".") and ". " not in text and "\n" not in text


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_images_of_a_shard_have_the_captions_of_their_samples(tmp_path, format):
    long = "a/" * 40 + "x" * 90  # more than the 100 bytes for a name in a header
    samples = {
        "0001": {"jpg": b"x", "txt": b" a cat \n", "json": b'{"caption": "not this"}'},
        "0000": {"PNG": b"x", "json": json.dumps({"caption": "ein Bär", "width": 3}).encode()},
        "v1.0/train/7": {"webp": b"x"},
        "v1.0/test/7": {"webp": b"x", "txt": "\ufeffRöntgen".encode()},
        "名前": {"jpeg": b"x", "txt": b"name"},
        long: {"tif": b"x", "cls": b"3"},
    }
    path = tmp_path / "000.tar"
    write_samples(path, samples, format=format)
    names = ["0001.jpg", "0000.PNG", "v1.0/train/7.webp", "v1.0/test/7.webp", "名前.jpeg", f"{long}.tif"]
    captions = ["a cat", "ein Bär", None, "Röntgen", "name", None]
    assert find_targets([path]) == [
        Target((f"{path}/{name}",), caption, name=f"000.tar/{name}")
        for name, caption in zip(names, captions, strict=True)
    ]


def test_every_image_of_a_sample_is_a_target(tmp_path):
    """WebDataset reads them as parts of one sample."""
    path = tmp_path / "a.tar"
    members = {
        "a": {"seg.png": b"x", "jpg": b"x", "npy": b"x", "txt": b"ay"},
        "IMG_22": {"0.png": b"x", "1.png": b"x", "2.PNG": b"x", "0.txt": b"zero", "1.json": b'{"caption": "one"}'},
        "v1.0/b": {"rgb.png": b"x", "json": b'{"caption": "bee"}', "rgb.txt": b"red"},
    }
    write_samples(path, members)
    result = {target.paths[0].removeprefix(f"{path}/"): target.caption for target in find_targets([path])}
    assert result == {
        **{"a.jpg": "ay", "a.seg.png": "ay"},
        **{"IMG_22.0.png": "zero", "IMG_22.1.png": "one", "IMG_22.2.PNG": None},
        "v1.0/b.rgb.png": "red",
    }


def test_truncated_image_leaves_the_others(tmp_path):
    path = tmp_path / "a.tar"
    offsets = archive(path, [("IMG_22.0.png", encode(0)), ("IMG_22.1.png", encode(1))])
    with path.open("r+b") as file:
        file.truncate(offsets[1][1] - 5)
    whole, cut = find_targets([path])
    assert (whole.paths, whole.error) == ((f"{path}/IMG_22.0.png",), None)
    assert "ends early or is damaged (samples found: 1)" in cut.error


def test_files_of_a_sample_need_not_be_adjacent(tmp_path):
    path = tmp_path / "a.tar"
    archive(
        path,
        [
            ("a.jpg", b"x"),
            ("b.jpg", b"x"),
            ("b.txt", b"bee"),
            ("b.json", b'{"caption": "B"}'),
            ("a.txt", b"ay"),
            ("c.txt", b"see"),
            ("c.jpg", b"x"),
        ],
    )
    assert [result.caption for result in find_targets([path])] == ["ay", "bee", "see"]


def test_hidden_files_and_other_files_are_left_out(tmp_path):
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "a.png"
    folder = tarfile.TarInfo("folder.png")
    folder.type = tarfile.DIRTYPE
    names = ["._a.png", ".hidden.png", ".git/a.png", "__MACOSX/._a.png", "../a.png", "notes", "b.txt", "a.png", "jpg"]
    path = tmp_path / "a.tar"
    archive(path, [(folder, None), *((name, b"x") for name in names), (link, None)])
    assert [result.paths for result in find_targets([path])] == [(f"{path}/a.png",)]


@pytest.mark.parametrize("prefix", ["./", "/", "./b/../", ".//"])
def test_names_are_normalized_and_stay_inside_the_shard(tmp_path, prefix):
    path = tmp_path / "a.tar"
    archive(path, [(f"{prefix}a.png", encode(1)), ("b.png", encode(2))])
    result = find_targets([path])
    if ".." in prefix:
        assert [one.name for one in result] == ["a.tar/b.png"]
    else:
        assert [one.name for one in result] == ["a.tar/a.png", "a.tar/b.png"]
        assert np.array_equal(load_image(result[0].paths[0], 16), pixels(1))


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        *[("txt", content) for content in (b"", b" \n", b"caf\xe9", b"x" * 2_000_000)],
        *[
            ("json", content)
            for content in (
                b"{",
                b"[" * 100_000,
                b'["caption"]',
                b'{"caption": ["x"]}',
                b'{"caption": null}',
                b'{"text": "x"}',
            )
        ],
    ],
)
def test_invalid_caption_leaves_the_image(tmp_path, kind, content):
    write_samples(tmp_path / "a.tar", {"0": {kind: content, "png": b"x"}, "1": {"png": b"x", "txt": b"y"}})
    assert [(result.caption, result.error) for result in find_targets([tmp_path / "a.tar"])] == [
        (None, None),
        ("y", None),
    ]


def test_images_of_a_shard_are_read_by_their_paths(tmp_path):
    path = tmp_path / "000.tar"
    write_three_samples(path)
    for seed, target in enumerate(find_targets([path])):
        assert target.paths == (f"{path}/{seed:04}.png",)
        assert np.array_equal(load_image(*target.paths, 16), pixels(seed))
        assert find_targets(target.paths) == [Target(target.paths, name=f"{seed:04}.png")]
    (tmp_path / "list.csv").write_text("file,caption\n000.tar/0002.png,mine\n000.tar/0009.png,none\n")
    listed, missing = find_targets([tmp_path / "list.csv"])
    assert (listed.paths, listed.caption) == ((f"{path}/0002.png",), "mine")
    assert "Line 3 of" in missing.error
    both = find_targets([path, tmp_path / "list.csv"])  # with two captions of one image
    assert [target.caption for target in both] == ["caption 0" * 50, "caption 1" * 50, None, "none"]


def test_unknown_paths_in_a_shard_are_refused(tmp_path):
    path = tmp_path / "000.tar"
    write_three_samples(path)
    for name in ("0009.png", "0000.txt", "x/0000.png", "000.png"):
        with pytest.raises(UserError, match=f"There is no image '{name}' in the shard"):
            load_image(path / name, 16)
        with pytest.raises(UserError, match="There is no file or folder"):
            find_targets([path / name])
    with pytest.raises(UserError, match=r"There is no file '.*001.tar/0000.png'"):
        load_image(tmp_path / "001.tar" / "0000.png", 16)
    with pytest.raises(UserError, match="more than the 99 bytes"):
        load_image(path / "0000.png", 16, max_bytes=99)
    size = len(encode(0))
    assert np.array_equal(load_image(path / "0000.png", 16, max_bytes=size), pixels(0))
    with pytest.raises(UserError, match=f"more than the {size - 1} bytes"):
        load_image(path / "0000.png", 16, max_bytes=size - 1)


def test_folder_may_be_named_like_a_shard(tmp_path):
    folder = tmp_path / "x.tar"
    folder.mkdir()
    (folder / "a.png").write_bytes(encode(1))
    write_three_samples(folder / "y.tar")
    assert [result.paths[0] for result in find_targets([folder])] == [
        f"{folder}/a.png",
        *(f"{folder}/y.tar/{i:04}.png" for i in range(3)),
    ]
    assert np.array_equal(load_image(folder / "a.png", 16), pixels(1))
    assert np.array_equal(load_image(folder / "y.tar" / "0002.png", 16), pixels(2))


def test_folders_and_patterns_may_contain_shards(tmp_path):
    for i in range(3):
        write_samples(tmp_path / f"{i}.tar", {"a": {"png": b"x"}})
    write_samples(tmp_path / ".hidden.tar", {"a": {"png": b"x"}})
    (tmp_path / "1.png").write_bytes(encode(0))
    (tmp_path / "1.tar.gz").write_bytes(b"x")
    names = ["0.tar/a.png", "1.png", "1.tar/a.png", "2.tar/a.png"]
    assert [result.name for result in find_targets([tmp_path])] == names
    assert [result.name for result in find_targets([tmp_path / "*"])] == names
    assert [result.name for result in find_targets([f"{tmp_path}/*.tar"])] == [names[0], *names[2:]]
    assert [result.name for result in find_targets([f"{tmp_path}/{{1..2}}.tar"])] == names[2:]
    whole, *none = find_targets([f"{tmp_path}/{{1..2}}.tar"], one_subject=True)
    assert (len(whole.paths), whole.name, none) == (2, "a.png and 1 more", [])


def test_compressed_shards_are_refused(tmp_path):
    for name in ("a.tar.gz", "a.TGZ", "a.tar.zst"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(UserError, match=f"{name}' is compressed") as caught:
            find_targets([tmp_path / name])
        assert is_one_sentence(str(caught.value))
    write_three_samples(tmp_path / "b.tar")
    result = find_targets([tmp_path / "a.tar.gz", tmp_path / "b.tar"])
    assert [bool(target.error) for target in result] == [True, False, False, False]
    with tarfile.open(tmp_path / "c.tar", "w:gz") as tar:
        tar.add(tmp_path / "b.tar", "a.png")
    with pytest.raises(UserError, match=r"c.tar' is not a .tar archive, is compressed"):
        find_targets([tmp_path / "c.tar"])


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"no archive\n" * 1000, bytes(511), encode(0) * 3])
def test_files_that_are_not_archives_are_refused(tmp_path, content):
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a.tar' is not a .tar archive") as caught:
        find_targets([path])
    assert is_one_sentence(str(caught.value))
    (tmp_path / "b.png").write_bytes(encode(0))
    assert find_targets([tmp_path]) == [
        Target((), error=str(caught.value), name=str(path)),
        Target((f"{tmp_path}/b.png",), name="b.png"),
    ]
    with pytest.raises(UserError, match=r"a.tar' is not a .tar archive"):
        load_image(path / "a.png", 16)


def test_shards_without_images_are_refused(tmp_path):
    archive(tmp_path / "empty.tar", [])
    archive(tmp_path / "words.tar", [("a.txt", b"x")])
    for name in ("empty", "words"):
        with pytest.raises(UserError, match=f"The shard '.*{name}.tar' has no images") as caught:
            find_targets([tmp_path / f"{name}.tar"])
        assert is_one_sentence(str(caught.value))


def test_unreadable_shard_is_refused(tmp_path, monkeypatch):
    write_three_samples(tmp_path / "a.tar")

    def forbidden(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", forbidden)
    with pytest.raises(UserError, match=r"The shard '.*a.tar' cannot be read \(Permission denied\)"):
        find_targets([tmp_path / "a.tar"])


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_shard_that_ends_early_keeps_its_complete_samples(tmp_path, format):
    path = tmp_path / "a.tar"
    offsets = write_three_samples(path, format=format)  # of each sample .cls, .png, .txt
    data = path.read_bytes()
    ends = sorted({place + more for places_of_one in offsets for place in places_of_one for more in (-1, 0, 1)})
    seen = set()
    for end in ends:
        if end < 512:
            continue
        path.write_bytes(data[:end])
        reached = next((i for i, (_, _, padded) in enumerate(offsets) if end <= padded), len(offsets))
        whole = sum(offsets[3 * i + 1][1] <= end for i in range(3))  # images
        # A sample is known to be cut where one of its files begins and does not end.
        inside = reached < len(offsets) and offsets[reached][0] <= end < offsets[reached][1]
        cut = reached // 3 if inside else None
        names = [f"{i:04}" for i in range(whole) if i != cut]
        if not names:
            with pytest.raises(UserError, match=r"ends within its first file|\(samples found: 0\)"):
                find_targets([path])
            continue
        *result, failed = find_targets([path])
        assert [target.name for target in result] == [f"a.tar/{name}.png" for name in names], end
        assert not any(target.error for target in result)
        assert failed.name == str(path)
        assert f"'{path}' " in failed.error
        assert f"(samples found: {len(names)})" in failed.error
        assert is_one_sentence(failed.error)
        known = cut is not None and reached % 3 > 0  # its image's header has been read
        assert failed.paths == ((f"{path}/{cut:04}.png",) if known else ()), end
        for target in result:
            assert np.array_equal(load_image(*target.paths, 16), pixels(int(target.name[6:10])))
        seen.add((len(names), known))
    assert seen == {(n, known) for n in (1, 2, 3) for known in (True, False)} - {(3, True)}


def test_truncated_image_is_refused_when_it_is_read(tmp_path):
    path = tmp_path / "a.tar"
    offsets = write_three_samples(path)
    path.write_bytes(path.read_bytes()[: offsets[4][1] - 1])
    with pytest.raises(UserError, match=r"ends early, within '0001.png'"):
        load_image(path / "0001.png", 16)
    assert np.array_equal(load_image(path / "0000.png", 16), pixels(0))


def test_shard_that_ends_early_leaves_the_others(tmp_path):
    offsets = write_three_samples(tmp_path / "a.tar")
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[: offsets[4][1] - 1])
    write_three_samples(tmp_path / "b.tar")
    assert [bool(result.error) for result in find_targets([tmp_path])] == [False, True, False, False, False]


def test_damaged_header_is_reported(tmp_path):
    path = tmp_path / "a.tar"
    offsets = write_three_samples(path)
    data = bytearray(path.read_bytes())
    data[offsets[5][2] + 20] ^= 255  # in the first header of the third sample
    path.write_bytes(data)
    *result, failed = find_targets([path])
    assert [target.name for target in result] == ["a.tar/0000.png", "a.tar/0001.png"]
    assert "(samples found: 2)" in failed.error


def test_any_damage_is_reported_or_harmless(tmp_path):
    path = tmp_path / "a.tar"
    offsets = write_three_samples(path)
    data = path.read_bytes()
    headers = [0, *(end for _, _, end in offsets)]
    draw = random.Random(0)
    reported = 0
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(draw.choice([1, 1, 3])):
            damaged[draw.choice(headers) + draw.randrange(2048)] = draw.choice([0, 45, 48, 128, 255])
        path.write_bytes(damaged)
        samples = shards.find_samples(str(path))
        assert samples
        reported += samples[-1].error is not None
        for sample in samples:
            if not sample.error:
                shards.read_member(path, sample.name, 10)
        assert all(is_one_sentence(sample.error) for sample in samples if sample.error)
    assert 100 < reported < 400


@pytest.mark.parametrize("size", [-2048, -2, 2**80])
@pytest.mark.parametrize("name", [b"b.txt", b"b.png"])
def test_invalid_size_is_reported(tmp_path, size, name):
    path = tmp_path / "a.tar"
    archive(path, [("a.png", encode(0)), ("b.txt", b"x"), ("b.png", b"")], format=tarfile.GNU_FORMAT)
    data = bytearray(path.read_bytes())
    start = data.index(name)
    data[start + 124 : start + 136] = (size % 2**96 | 2**95).to_bytes(12, "big")  # as GNU tar writes longer names
    data[start + 148 : start + 156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    path.write_bytes(data)
    with open(path, "rb") as file:
        file.seek(start)
        assert tarfile.TarInfo.frombuf(file.read(512), "utf-8", "strict").size == size
    good, failed = find_targets([path])
    assert (good.name, "(samples found: 1)" in failed.error) == ("a.tar/a.png", True)
    assert np.array_equal(load_image(*good.paths, 16), pixels(0))


def test_invalid_header_is_reported(tmp_path):
    path = tmp_path / "a.tar"
    sparse = tarfile.TarInfo("b.png")
    sparse.pax_headers = {"GNU.sparse.map": "no numbers"}
    archive(path, [("a.png", encode(0)), (sparse, b"x"), ("c.png", b"x")], format=tarfile.PAX_FORMAT)
    good, failed = find_targets([path])
    assert (good.name, "(samples found: 1)" in failed.error) == ("a.tar/a.png", True)
    archive(path, [(sparse, b"x"), ("c.png", b"x")], format=tarfile.PAX_FORMAT)
    with pytest.raises(UserError, match=r"is not a .tar archive"):
        find_targets([path])


def test_shard_is_indexed_once(tmp_path, monkeypatch):
    path = tmp_path / "a.tar"
    write_three_samples(path)
    passes = []
    members = shards._members
    monkeypatch.setattr(shards, "_members", lambda tar: passes.append(1) or members(tar))
    shards._index.cache_clear()  # as in a new process
    for _ in range(5):
        for seed in range(3):
            assert np.array_equal(load_image(path / f"{seed:04}.png", 16), pixels(seed))
    assert len(passes) == 1
    write_samples(path, {"0000": {"png": encode(5), "txt": b"longer than it was before" * 99}})
    assert np.array_equal(load_image(path / "0000.png", 16), pixels(5))
    assert len(passes) == 2


def test_last_file_of_a_name_is_used(tmp_path):
    archive(tmp_path / "a.tar", [("a.png", encode(1)), ("b.png", encode(2)), ("a.png", encode(3))])
    with tarfile.open(tmp_path / "a.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    expected = load_image(tmp_path / "a.png", 16).tobytes()
    assert load_image(tmp_path / "a.tar" / "a.png", 16).tobytes() == expected
    assert len(find_targets([tmp_path / "a.tar"])) == 2


def test_only_headers_and_captions_are_read_to_find_targets(tmp_path):
    """The shard is a sparse file whose images would take minutes to read."""
    path = tmp_path / "a.tar"
    size = 1_000_000_000
    with open(path, "wb") as file:
        for i in range(20):
            info = tarfile.TarInfo(f"{i}.png")
            info.size = size
            file.write(info.tobuf(tarfile.GNU_FORMAT))
            file.seek(size, os.SEEK_CUR)
        file.write(bytes(1024))
    reached = time.perf_counter()
    assert len(find_targets([path])) == 20
    assert time.perf_counter() - reached < 5


def test_run_continues_without_broken_inputs(tiny, tmp_path):
    shard, lines = tmp_path / "a.tar", tmp_path / "list.jsonl"
    offsets = write_three_samples(shard)
    shard.write_bytes(shard.read_bytes()[: offsets[4][1] - 1])
    (tmp_path / "b.png").write_bytes(encode(7))
    lines.write_text('{"file": "b.png"}\n{"file": "c.png"}\n')
    args = f"fit --run {tmp_path / 'run'} --trainer.accelerator cpu --model PEZ --model.backbone {tiny}".split()
    args += (
        "--model.num_tokens 2 --model.sampler.num_inference_steps 2 --model.steps 1 --data.num_noise_samples 1".split()
    )
    args += ["--data.num_validation_samples", "2", "--data.images", str(shard), str(lines)]

    def problems():
        return json.loads((tmp_path / "run" / "result.json").read_text())["problems"]

    main(args)
    first, cut, listed, broken = before = problems()
    assert [problem["target"] for problem in before] == ["a.tar/0000.png", str(shard), "b.png", f"line 2 of {lines}"]
    assert [problem["status"] == "failed" for problem in before] == [False, True, False, True]
    assert "(samples found: 1)" in cut["reason"]
    assert f"Line 2 of '{lines}' names" in broken["reason"]
    assert first["prompt"]
    assert listed["prompt"]
    main([*args, "--ckpt_path", "last"])
    assert [problem["key"] for problem in problems()] == [problem["key"] for problem in before]
    write_three_samples(shard)
    (tmp_path / "c.png").write_bytes(encode(8))
    main([*args, "--ckpt_path", "last"])
    after = problems()
    assert [problem["target"] for problem in after] == [*(f"a.tar/{i:04}.png" for i in range(3)), "b.png", "c.png"]
    assert all(problem["prompt"] for problem in after)
    assert (after[0]["key"], after[0]["prompt"]) == (first["key"], first["prompt"])
