"""The held-out set depends on content and seed only; near duplicates are found, and stay on one side."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentflow.data import Source, check_source, find_source, split
from latentflow.data.checking import inspect_images as module
from latentflow.data.checking.inspect_images import inspect_images
from latentflow.data.splits import BITS, near_duplicates
from latentflow.errors import UserError

from .images import save_all


@pytest.fixture
def source(tmp_path: Path) -> Source:
    save_all(tmp_path, [f"{i:02}.png" for i in range(40)])
    return find_source(str(tmp_path))


def keys(source: Source, rows: list[int]) -> set[str]:
    return {source.examples[row].content_key() for row in rows}


def test_sizes_and_partition(source: Source) -> None:
    train, held_out = split(source, 0.25)
    assert len(held_out) == 10 and sorted(train + held_out) == list(range(40))
    assert train == sorted(train) and held_out == sorted(held_out)
    assert len(split(source, 7)[1]) == 7
    assert split(source, 0) == (list(range(40)), []) == split(source, 0.0)
    assert len(split(source, 0.001)[1]) == 1  # a share of something is never nothing


def test_order_and_names_do_not_matter(source: Source, tmp_path: Path) -> None:
    wanted = keys(source, split(source, 10)[1])
    backwards = dataclasses.replace(source, examples=source.examples[::-1])
    assert keys(backwards, split(backwards, 10)[1]) == wanted
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for index, example in enumerate(source.examples):
        shutil.copy(tmp_path / example.name, renamed / f"{39 - index}.png")
    again = find_source(str(renamed))
    assert keys(again, split(again, 10)[1]) == wanted


def test_the_seed_matters_and_a_larger_share_contains_the_smaller(source: Source) -> None:
    assert split(source, 10, seed=0) == split(source, 10, seed=0) != split(source, 10, seed=1)
    assert set(split(source, 5)[1]) < set(split(source, 12)[1])


def test_copies_stay_on_one_side(source: Source, tmp_path: Path) -> None:
    for index in range(40):
        shutil.copy(tmp_path / f"{index:02}.png", tmp_path / f"copy{index:02}.png")
    doubled = find_source(str(tmp_path))
    train, held_out = split(doubled, 0.25)
    assert len(held_out) == 20 and not keys(doubled, train) & keys(doubled, held_out)


@pytest.mark.parametrize("validation", [40, 1.0, -1, -0.5, 41])
def test_impossible(source: Source, validation: float) -> None:
    copies = dataclasses.replace(source, examples=(source.examples[0],) * 40)
    with pytest.raises(UserError, match="cannot hold out 1 of 40 images"):
        split(copies, 1)
    with pytest.raises(UserError, match=f"cannot hold out {validation} of 40 images"):
        split(source, validation)


# --- near duplicates ---------------------------------------------------------------------------------


def make_image(seed: int, width: int = 96, height: int = 96) -> Image.Image:
    """Smooth blobs, as photographs have; another seed is another image."""
    values = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def save_copies(root: Path, seed: int, name: str) -> list[str]:
    image = make_image(seed)
    image.save(root / f"{name}.png")
    image.save(root / f"{name}-poor.jpg", quality=80, subsampling=0)
    image.resize((48, 48)).save(root / f"{name}-small.webp", lossless=True)
    return [f"{name}-poor.jpg", f"{name}-small.webp", f"{name}.png"]


def as_before(source: Source, wanted: int, seed: int) -> list[int]:
    """What was held out before near duplicates were known: the lowest hashes of content."""
    ranks = [hashlib.sha256(f"{seed}:{key}".encode()).hexdigest() for key in source.content_keys()]
    return [i for i, rank in enumerate(ranks) if rank <= sorted(ranks)[wanted - 1]]


def test_copies_are_one_group_and_others_are_not(tmp_path: Path) -> None:
    names = save_copies(tmp_path, 0, "a")
    for seed in range(1, 40):
        make_image(seed).save(tmp_path / f"{seed}.png")
    # The same shapes in other colours, whose hash is near; and an image squeezed.
    Image.merge("RGB", make_image(0).split()[::-1]).save(tmp_path / "recoloured.png")
    make_image(0).resize((96, 60)).save(tmp_path / "squeezed.png")
    report = check_source(str(tmp_path))
    assert report.near_duplicates == (tuple(names),) and not report.duplicates
    assert any("1 group of near duplicates, 3 images in all" in warning for warning in report.warnings)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("plain")
    for seed in range(120):
        make_image(seed + 100).save(root / f"{seed:03}.png")
    return root


@pytest.mark.parametrize("seed", [0, 1])
def test_without_near_duplicates_the_split_is_what_it_was(plain: Path, seed: int) -> None:
    source = find_source(str(plain))
    for wanted in (1, 7, 60):
        assert split(source, wanted, seed)[1] == as_before(source, wanted, seed)


def test_near_duplicates_stay_on_one_side(plain: Path, tmp_path: Path) -> None:
    for seed in range(40):
        save_copies(tmp_path, seed, f"{seed:02}")
    for path in plain.iterdir():
        (tmp_path / f"z{path.name}").hardlink_to(path)
    source = find_source(str(tmp_path))
    group = [example.name[:2] if example.name[0] != "z" else example.name for example in source.examples]
    before = set(as_before(source, 60, 0))
    assert any(group[i] == group[j] for i in before for j in range(len(group)) if j not in before)
    train, held_out = split(source, 60)
    assert not {group[i] for i in train} & {group[i] for i in held_out}
    assert 60 <= len(held_out) < 66 and sorted(train + held_out) == list(range(len(source)))


def test_a_film_is_parted_rather_than_held_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for frame in range(30):
        image = make_image(0)
        image.putpixel((frame, 0), (0, 0, 0))
        image.save(tmp_path / f"{frame}.png")
    source = find_source(str(tmp_path))
    assert split(source, 3)[1] == as_before(source, 3, 0)
    assert "near duplicates" in caplog.text


def test_every_pair_within_reach_is_found_and_a_hundred_thousand_take_seconds() -> None:
    generator = np.random.default_rng(0)
    count = 50_000
    hashes = generator.integers(-(2**63), 2**63, count, dtype=np.int64)
    thumbnails = generator.integers(0, 256, (count, 192), dtype=np.uint8)
    flipped = generator.random((count, 64), dtype=np.float32).argsort(axis=1)[:, :BITS].astype(np.uint64)
    near = hashes.view(np.uint64) ^ np.bitwise_or.reduce(np.uint64(1) << flipped, axis=1)
    both = np.concatenate([hashes, near.view(np.int64)])
    start = time.process_time()
    groups = near_duplicates(both, np.concatenate([thumbnails] * 2), np.ones((2 * count, 2), np.int64))
    assert time.process_time() - start < 30
    assert np.array_equal(groups[:count], groups[count:]) and len(np.unique(groups)) == count


def test_a_long_film_takes_neither_minutes_nor_gigabytes() -> None:
    """All of its images resemble one another: their pairs, a few million here, are not to be held."""
    generator = np.random.default_rng(0)
    count = 4000
    flipped = generator.integers(0, 64, (count, 3)).astype(np.uint64)
    hashes = np.bitwise_xor.reduce(np.uint64(1) << flipped, axis=1).view(np.int64)
    thumbnails = 100 + generator.integers(0, 3, (count, 192), dtype=np.uint8)
    tracemalloc.start()
    groups = near_duplicates(hashes, thumbnails, np.ones((count, 2), np.int64))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(groups)) == 1 and peak < 100e6


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_workers_end_with_the_process_that_they_work_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MANY", 1)
    make_image(0).save(tmp_path / "a.png")
    source, pids = find_source(str(tmp_path)), tmp_path / "pids"
    child = os.fork()
    if child == 0:
        pool = module._workers(source)
        pids.write_text(str([pool.submit(os.getpid).result(), pool.submit(os.getpid).result()]))
        time.sleep(1000)
    deadline = time.monotonic() + 30
    while not (pids.exists() and pids.read_text().endswith("]")) and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = json.loads(pids.read_text())
    assert all(map(runs, workers)) and child not in workers
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while any(map(runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.01)
    left = [worker for worker in workers if runs(worker)]
    for worker in left:
        os.kill(worker, signal.SIGKILL)
    assert not left


def runs(process: int) -> bool:
    """Whether it is there, and not only waiting to be buried."""
    file = Path(f"/proc/{process}/stat")
    return file.exists() and file.read_text().rpartition(")")[2].split()[0] != "Z"


def test_inspected_images_are_remembered_until_a_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(3):
        make_image(seed).save(tmp_path / f"{seed}.png")
    (tmp_path / "bad.png").write_text("no image")
    opened: list[str] = []
    real = module._inspect_all
    monkeypatch.setattr(module, "_inspect_all", lambda e: (opened.extend(x.name for x in e), real(e))[1])
    source = find_source(str(tmp_path))
    first = list(inspect_images(source, progress=False))
    assert opened == ["0.png", "1.png", "2.png", "bad.png"]
    opened.clear()
    assert list(inspect_images(source, progress=False)) == first
    assert opened == ["bad.png"]  # why it could not be read may have passed
    make_image(9, 80).save(tmp_path / "1.png")
    opened.clear()
    assert list(inspect_images(source, progress=False))[1].size == (80, 96) and opened == ["1.png", "bad.png"]


def test_a_damaged_memory_of_inspected_images_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "data").mkdir()
    make_image(0).save(tmp_path / "data" / "0.png")
    monkeypatch.setenv("LATENTFLOW_CACHE", str(tmp_path / "cache"))
    source = find_source(str(tmp_path / "data"))
    first = list(inspect_images(source, progress=False))
    (database,) = (tmp_path / "cache").iterdir()
    database.write_bytes(b"no database" * 1000)
    assert list(inspect_images(source, progress=False)) == first
    assert f"cannot be remembered in {database}" in caplog.text and len(caplog.records) == 1


# --- classes -----------------------------------------------------------------------------------------


def labelled(tmp_path: Path, counts: dict[str, int]) -> Source:
    for number, (name, count) in enumerate(counts.items()):
        (tmp_path / name).mkdir()
        for index in range(count):
            make_image(1000 * number + index, 24, 24).save(tmp_path / name / f"{index}.png")
    return find_source(str(tmp_path))


def held_out_of(source: Source, wanted: float | int, **settings: Any) -> dict[str, int]:
    """Return how many of each class are held out."""
    rows = split(source, wanted, **settings)[1]
    counts = Counter(source.examples[row].label or "" for row in rows)
    return {name: counts[name] for name in source.classes}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_class_is_held_out_in_proportion(tmp_path: Path, seed: int) -> None:
    source = labelled(tmp_path, {"a": 40, "b": 20, "c": 20, "d": 4})
    assert held_out_of(source, 21, seed=seed) == {"a": 10, "b": 5, "c": 5, "d": 1}
    assert held_out_of(source, 4, seed=seed) == {"a": 2, "b": 1, "c": 1, "d": 0}
    for wanted in range(1, 30):  # none is more than one image from its share
        for name, count in held_out_of(source, wanted, seed=seed).items():
            share = wanted * sum(e.label == name for e in source.examples) / len(source)
            assert abs(count - share) < 1
    smaller, larger = (set(split(source, wanted, seed)[1]) for wanted in (7, 22))
    assert smaller < larger
    assert split(source, 7, seed, stratify=False)[1] == as_before(source, 7, seed)


def test_which_images_of_a_class_are_held_out_is_a_matter_of_the_seed_and_their_content(
    tmp_path: Path,
) -> None:
    source = labelled(tmp_path, {"a": 30, "b": 30})
    backwards = dataclasses.replace(source, examples=source.examples[::-1])
    assert keys(source, split(source, 8)[1]) == keys(backwards, split(backwards, 8)[1])
    assert split(source, 8) != split(source, 8, seed=1)
    unlabelled = find_source(
        str(tmp_path), condition="none"
    )  # for an autoencoder: the folders are what is left
    assert split(unlabelled, 8) == split(source, 8)


def test_a_class_of_near_duplicates_is_not_held_out_whole(tmp_path: Path) -> None:
    for name in ("film", "photos"):
        (tmp_path / name).mkdir()
    for number in range(20):
        image = make_image(0)
        image.putpixel((number, 0), (0, 0, 0))
        image.save(tmp_path / "film" / f"{number}.png")
        make_image(number + 1).save(tmp_path / "photos" / f"{number}.png")
    assert held_out_of(find_source(str(tmp_path)), 4) == {"film": 0, "photos": 4}


def test_a_few_images_show_all_that_there_is(tmp_path: Path) -> None:
    source = labelled(tmp_path, {f"{number:02}": 3 for number in range(12)} | {"99": 20})

    def shown(count: int) -> Counter[str | None]:
        rows = source.spread(count)
        assert rows == sorted(set(rows)) and len(rows) == min(count, len(source))
        return Counter(source.examples[row].label for row in rows)

    assert set(shown(26).values()) == {2} and len(shown(13)) == 13
    assert [*shown(4)] == ["00", "03", "06", "09"]  # of more classes than images some from all over
    assert shown(1000) == Counter(example.label for example in source.examples)
    assert shown(45)["99"] == 9  # the others have no more
