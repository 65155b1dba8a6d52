"""The report for the terminal: each figure with a phrase that says what is good."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

_WIDTH = 110


def lines(report: dict[str, Any]) -> list[str]:
    """Return the report, as `latentflow evaluate` measured it, in lines for the terminal."""
    label = "class" if report["data"]["kind"] == "class" else "caption"
    return [
        *_space(report["feature_space"], label),
        *_pixels(report, label),
        *_more(report),
        *_layouts(report),
        *_edges(report),
        *_networks(report),
        *_known(report),
    ]


# ---------------------------------------------------------------- sections


def _space(found: dict[str, Any], label: str) -> Iterator[str]:
    yield _wrapped(
        f"In the feature space {found['space']}: {found['generated']:,} generated images, beside "
        f"{found['real']:,} real ones, against {found['reference']:,} other training images"
    )
    yield _distance("Frechet distance", found["frechet_distance"])
    yield _distance("kernel distance", found["kernel_distance"])
    for name, meaning in (
        ("precision", "of the generated images look like real ones"),
        ("recall", "of the real images are like a generated one"),
        ("coverage", "of the real images have a generated one near them"),
    ):
        value = found[name]
        if value["value"] is None:
            yield _figure(name, f"unknown: {value['value_reason']}")
        else:
            yield _figure(name, f"{value['value']:.1%} {meaning} (real images: {value['real']:.1%})")
    density = found["density"]
    if density["value"] is not None:
        text = f"{density['value']:.2f} (real images: {density['real']:.2f}; higher is better: images are typical)"
        yield _figure("density", text)
    if accuracy := found.get("class_accuracy"):
        real = accuracy["real"]["share"]
        text = f"{_share(accuracy)} are nearest to images of their class (real images: {real:.1%}; "
        yield _figure("class accuracy", f"{text}by chance: {accuracy['chance']:.1%})")
    yield from _retrieval(found.get("caption_retrieval"), label)
    if pairs := found.get("combinations"):
        yield from _combinations(pairs)
    diversity = found["diversity"]
    if diversity.get("ratio") is None:
        yield _figure("diversity", f"unknown: {diversity.get('ratio_reason') or diversity['value_reason']}")
    else:
        pairs = f"of one {label} " if diversity["within"] == "condition" else ""
        text = f"images {pairs}differ {diversity['ratio']:.2f} times as much as real ones (1 is best)"
        yield _figure("diversity", text)


def _pixels(report: dict[str, Any], label: str) -> Iterator[str]:
    yield "In pixels of thumbnails, which see colours and layout only"
    yield _distance("Frechet distance", report["frechet_distance"])
    yield from _retrieval(report.get("caption_retrieval"), label)
    copies, distance = report["memorisation"]["copies"], report["memorisation"]["ratio"]
    low, high = copies["usual"]
    varied = ""
    if variations := report.get("memorisation_of_variations"):
        varied = f"; of variations of training images {_share(variations['copies'])}"
    yield _figure(
        "copies",
        f"{_share(copies)} are closer to a training image than 95 % of new images are (without memorising: "
        f"{low:.1%} to {high:.1%}){varied}",
    )
    yield _figure(
        "nearest image", f"{distance:.2f} times as far as from a new real image (near 0: copies; 1: new)"
    )


def _more(report: dict[str, Any]) -> Iterator[str]:
    if "fid" in report:
        yield _distance("FID", report["fid"])
    if clip := report.get("clip_score"):
        value, real = (_number(clip, name) for name in ("value", "real"))
        yield _figure("CLIP score", f"{value} (real images: {real}; higher is better)")
    if attributes := report.get("attributes"):
        text = f"{_share(attributes['right'])} are nearest to the real image with their attribute "
        yield _figure("attributes", f"{text}(by chance: {attributes['chance']:.1%})")
    for name, right in report.get("shapes", {}).items():
        yield _figure(f"shapes, {name.replace('_', ' ')}", f"{_share(right)} show what they should")


def _layouts(report: dict[str, Any]) -> Iterator[str]:
    if measured := report.get("layouts"):
        iou = {name: f"{value:.3f}" for name, value in measured["mean_iou"].items()}
        caption = f", {iou['map_and_caption']} with its caption too" if "map_and_caption" in iou else ""
        reach = f"real images: {iou['real']}, through the autoencoder {iou['autoencoder']}"
        text = f"mean IoU {iou['map']} under the label map{caption}, {iou['nothing']} without ({reach})"
        yield _figure("layouts", text)


def _edges(report: dict[str, Any]) -> Iterator[str]:
    if measured := report.get("edges"):
        f1 = {name: f"{part['f1']:.3f}" for name, part in measured.items() if name != "images"}
        spans = {
            name: "95 %: {:.3f} to {:.3f}".format(*measured[name]["interval_95"])
            for name in ("map", "nothing")
        }
        reach = f"real images: {f1['real']}, through the autoencoder {f1['autoencoder']}"
        text = f"F1 {f1['map']} ({spans['map']}) under the edge map, {f1['nothing']} ({spans['nothing']}) without"
        yield _figure("edges", f"{text} ({measured['images']} images; {reach})")


def _networks(report: dict[str, Any]) -> Iterator[str]:
    yield "The networks, on images that were not trained on"
    for name, part in report["reconstruction"].items():
        psnr, ssim = (_number(part, figure) for figure in ("psnr", "ssim"))
        text = f"PSNR {psnr} dB, SSIM {ssim} (higher is better; no generated image can be sharper)"
        yield _figure("autoencoder", f"{name.replace('_', ' ')}: {text}")
    for name, part in report["validation_loss"].items():
        text = f"{_mean(part)} (lower is better, for one autoencoder and data set)"
        yield _figure(_loss_name(part), f"{name.replace('_', ' ')}: {text}")
    if trained := report.get("training_loss"):  # reports of before have none
        text = f"training images: {_mean(trained)} (far below: it memorises)"
        if without := trained.get("without_condition"):
            gain = [b - a for a, b in zip(trained["by_time"], without["by_time"], strict=True)]
            most = max(range(len(gain)), key=gain.__getitem__)
            text += (
                f"; without their conditions {_mean(without)}, which lacks most at t = {trained['times'][most]:.2g} "
                f"({trained['by_time'][most]:.2f} with them, {without['by_time'][most]:.2f} without)"
            )
        yield _figure(_loss_name(trained), text)


def _loss_name(part: dict[str, Any]) -> str:
    """Return what the loss is of; reports of before compared velocities without saying so."""
    kind = part.get("prediction", "velocity")
    return part.get("unit") or ("flow loss" if kind == "velocity" else f"loss of {kind}")


def _known(report: dict[str, Any]) -> Iterator[str]:
    if probed := report.get("probe"):
        text = f"unknown: {probed.get('best_reason')}"
        if best := probed["best"]:
            text = (
                f"{_share(best['linear'])} by a linear probe behind block {best['block']} at t = {best['t']}"
            )
            text += f", {best['nearest']['share']:.1%} by the 5 nearest images there"
            if chosen := best.get("chosen_by"):  # reports of before have none
                text += f"; chosen by training images set aside ({_share(chosen)})"
        yield _figure("classes read", text)
    for name, part in report.get("likelihood", {}).items():
        error = f" +- {part['standard_error']:.2g}" if part["standard_error"] is not None else ""
        most = "at most " if part.get("at_most") else ""
        text = f"{name.replace('_', ' ')}: {most}{part['bits_per_dim']:.4f}{error} bits per dimension of the latents"
        if most:
            text += " (a lower bound of the likelihood)"
        if "other" in report["likelihood"]:
            text += " without a condition"
        if "auroc" in part:
            text += (
                f"; AUROC {part['auroc']:.3f} by the density, {part['auroc_of_typicality']:.3f} by typicality"
            )
        yield _figure("density", text)


# ---------------------------------------------------------------- parts of lines


def _retrieval(found: dict[str, Any] | None, label: str) -> Iterator[str]:
    """Return the line of captions or classes that are found, beside those of real images that were not trained on."""
    if found is None:
        return
    top_1, top_5 = found["top_1"], found["top_5"]
    beside = "".join(
        f"; real images, {name.removeprefix('real_').replace('_', ' ')}: {part['top_1']['share']:.1%}"
        for name, part in found.items()
        if name.startswith("real_")
    )
    yield _figure(
        f"{label} found",
        f"{_share(top_1)} by the nearest training image, {top_5['share']:.1%} among the nearest 5 (by chance: "
        f"{top_1['chance']:.1%} and {top_5['chance']:.1%}{beside})",
    )


def _combinations(found: dict[str, Any]) -> Iterator[str]:
    """Return the lines of captions that combine an attribute with words that were never seen with it."""
    for name, key, meaning in (
        (
            "right attribute",
            "attribute",
            "of unseen combinations are nearest to an image with their attribute",
        ),
        ("right content", "rest", "are, among images with other attributes, nearest to the same thing"),
    ):
        if found[key].get("share") is None:
            yield _figure(name, f"unknown: {found[key]['share_reason']}")
        else:
            yield _figure(
                name, f"{_share(found[key])} {meaning} (real images: {found[key]['real']['share']:.1%})"
            )
    text = "are, among real images with their attribute, nearest to the one with their caption"
    yield _figure("both right", f"{_share(found['caption'])} {text}")


def _distance(name: str, found: dict[str, Any]) -> str:
    if found["value"] is None:
        return _figure(name, f"unknown: {found['value_reason']}")
    error, floor_error = (
        f" +- {found[key]:.2g}" if key in found else "" for key in ("standard_error", "floor_standard_error")
    )
    floor = f"{found['floor']:.3g}{floor_error}"
    return _figure(name, f"{found['value']:.3g}{error} (as many real images: {floor}; lower is better)")


def _share(found: dict[str, Any]) -> str:
    low, high = found["interval_95"]
    return f"{found['share']:.1%} ({found['count']} of {found['n']}; 95 %: {low:.1%} to {high:.1%})"


def _number(found: dict[str, Any], name: str) -> str:
    value = found[name]
    return f"unknown ({found[f'{name}_reason']})" if value is None else f"{value:.4g}"


def _mean(found: dict[str, Any]) -> str:
    error = "" if found.get("standard_error") is None else f" +- {found['standard_error']:.2g}"
    return _number(found, "value") + error


def _figure(name: str, text: str) -> str:
    return _wrapped(f"  {name:<18}{text}", indent=20)


def _wrapped(text: str, indent: int = 2) -> str:
    return textwrap.fill(text, _WIDTH, subsequent_indent=" " * indent, break_long_words=False)
