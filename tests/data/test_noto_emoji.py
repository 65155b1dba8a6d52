"""The recipe that rebuilds the emoji folder, on a tiny made-up repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentflow.errors import UserError

from .images import load_program

TONES = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}
KEYS = ["file_name", "text", "group", "subgroup", "skin_tone"]


@pytest.fixture
def main(repository: Path) -> Any:
    return load_program(repository / "train" / "recipes" / "noto_emoji.py").main


@pytest.fixture
def made_up(tmp_path: Path) -> tuple[str, str]:
    """Ten people in five tones, a face, a heart with a variation selector, a pair of two tones, a keycap,
    a digit, a bare tone, a private symbol."""
    lines = ["# emoji-test.txt", "# group: Smileys & Emotion", "# subgroup: face-smiling"]
    lines += ["1F600 ; fully-qualified # 😀 E1.0 grinning face", "# subgroup: heart"]
    lines += ["2764 FE0F ; fully-qualified # ❤️ E0.6 red heart", "2764 ; unqualified # ❤ E0.6 red heart"]
    lines += ["# group: People & Body", "# subgroup: person"]
    keys = ["1f600", "2764", "0023_20e3", "0030", "1f3fb", "fe4e5"]
    for code in range(0x1F466, 0x1F470):
        lines.append(f"{code:X} ; fully-qualified # x E0.6 person {code:x}")
        keys.append(f"{code:x}")
        for tone, word in TONES.items():
            lines.append(f"{code:X} {tone} ; fully-qualified # x E1.0 person {code:x}: {word} skin tone")
            keys.append(f"{code:x}_{tone.lower()}")
    two = "1F468 1F3FB 200D 1F91D 200D 1F468 1F3FC"
    lines.append(f"{two} ; fully-qualified # x E12.0 men: light skin tone, medium-light skin tone")
    keys.append(two.lower().replace(" ", "_"))
    lines += ["# group: Component", "# subgroup: skin-tone", "1F3FB ; component # 🏻 E1.0 light skin tone"]
    lines += ["# group: Symbols", "# subgroup: keycap", "0023 FE0F 20E3 ; fully-qualified # #️⃣ E0.6 keycap: #"]
    (tmp_path / "emoji-test.txt").write_text("\n".join(lines), encoding="utf-8")
    folder = tmp_path / "noto" / "png" / "512"
    folder.mkdir(parents=True)
    for index, key in enumerate(keys):
        image = Image.new("RGBA", (32, 32))
        image.paste((index, 100, 200, 255), (8, 0, 24, 32))
        image.save(folder / f"emoji_u{key}.png")
    return str(tmp_path / "noto"), str(tmp_path / "emoji-test.txt")


def rows(folder: Path) -> dict[str, dict[str, str | None]]:
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["file_name"]: row for row in map(json.loads, lines)}


def test_layout_names_and_split(main: Any, made_up: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "emoji"
    main([*made_up, "-o", str(out), "--resolution", "16", "--test-images", "10"])
    train, test = rows(out / "train"), rows(out / "test")
    assert len(test) == 10 and len(train) == 10 + 40 + 1 + 4  # without the bare tone and the private symbol
    for part, listed in (("train", train), ("test", test)):
        assert {path.name for path in (out / part).glob("*.png")} == set(listed)
        assert list(listed) == sorted(listed) and all(list(row) == KEYS for row in listed.values())
    assert list(train["0030.png"].values()) == ["0030.png", "digit zero", "Other", "other", None]
    assert list(train["0023_20e3.png"].values()) == ["0023_20e3.png", "keycap: #", "Symbols", "keycap", None]
    assert train["2764.png"]["text"] == "red heart" and train["2764.png"]["subgroup"] == "heart"
    assert train["1f468_1f3fb_200d_1f91d_200d_1f468_1f3fc.png"]["skin_tone"] is None
    tones = [row["skin_tone"] for row in test.values()]
    assert sorted(tones) == sorted(list(TONES.values()) * 2)
    for name in test:  # the other four tones, and the image without one, are trained on
        person = name.split("_")[0]
        assert sum(other.startswith(f"{person}_1f3f") and "200d" not in other for other in train) == 4
        assert f"{person}.png" in train


def test_images(main: Any, made_up: tuple[str, str], tmp_path: Path) -> None:
    main([*made_up, "-o", str(tmp_path / "emoji"), "--resolution", "16", "--test-images", "0"])
    with Image.open(tmp_path / "emoji/train/1f600.png") as image:
        assert image.mode == "RGBA" and image.size == (16, 16)
        values = np.asarray(image)
    assert (values[:, 7:9] == [0, 100, 200, 255]).all() and (values[:, 0, 3] == 0).all()
    solid = values[values[..., 3] > 128].astype(int)
    assert np.abs(solid[:, 1:3] - [100, 200]).max() <= 4  # but for rounding, no fringe of the clear part


def test_the_same_input_gives_the_same_folder(main: Any, made_up: tuple[str, str], tmp_path: Path) -> None:
    for name in ("one", "two"):
        main([*made_up, "-o", str(tmp_path / name), "--resolution", "8", "--test-images", "5"])
    for path in (tmp_path / "one").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


def test_held_out_list(main: Any, made_up: tuple[str, str], tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("1f466_1f3fc.png\n" + json.dumps({"file_name": "1f467_1f3ff.png"}) + "\n")
    arguments = [*made_up, "-o", str(tmp_path / "emoji"), "--resolution", "8", "--held-out", str(listed)]
    main(arguments)
    assert set(rows(tmp_path / "emoji/test")) == {"1f466_1f3fc.png", "1f467_1f3ff.png"}
    with pytest.raises(UserError, match="exists already"):
        main(arguments)
    listed.write_text("nobody.png\n")
    with pytest.raises(UserError, match=r"names 1 images that are not there: nobody.png"):
        main(arguments)


def test_what_cannot_work(main: Any, made_up: tuple[str, str], tmp_path: Path) -> None:
    noto, names = made_up
    with pytest.raises(UserError, match="10 exist in all skin tones"):
        main([noto, names, "-o", str(tmp_path / "x"), "--test-images", "11"])
    with pytest.raises(UserError, match=r"no emoji_u\*.png"):
        main([str(tmp_path), names, "-o", str(tmp_path / "x")])
    (tmp_path / "other.txt").write_text("# nothing here\n")
    with pytest.raises(UserError, match="lists no emoji"):
        main([noto, str(tmp_path / "other.txt"), "-o", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()
