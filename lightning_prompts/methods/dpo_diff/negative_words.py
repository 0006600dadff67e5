"""Common words of negative prompts, by kind; written for this project, under its license."""

SLOTS = 4  # in a negative prompt, as in the paper
NEGATIVE_WORDS: dict[str, tuple[str, ...]] = {
    "sharpness": ("blurry", "out of focus", "soft", "hazy", "smeared", "motion blur", "low resolution", "pixelated"),
    "noise": ("noisy", "grainy", "speckled", "jpeg artifacts", "banding", "moire", "dirty", "scratched"),
    "light": ("dark", "underexposed", "overexposed", "dim", "washed out", "flat lighting", "harsh shadows", "glare"),
    "color": ("dull", "faded", "desaturated", "oversaturated", "monochrome", "muddy colors", "color cast", "sepia"),
    "framing": ("cropped", "cut off", "off center", "tilted", "cluttered", "empty", "far away", "border", "frame"),
    "form": ("deformed", "distorted", "asymmetric", "malformed", "disproportionate", "broken", "fused", "melted"),
    "body": ("extra limbs", "missing limbs", "bad hands", "extra fingers", "crossed eyes", "bad anatomy", "long neck"),
    "quality": ("ugly", "bad", "worst quality", "amateur", "sloppy", "unfinished", "boring", "poorly drawn"),
    "overlay": ("text", "watermark", "signature", "logo", "caption", "stamp", "username", "collage"),
    "medium": ("drawing", "painting", "sketch", "cartoon", "render", "plastic", "photo", "clip art"),
    "pattern": ("striped", "spotted", "dotted", "checkered", "repetitive", "tiled", "busy", "textured"),
    "size": ("tiny", "huge", "small", "large", "many", "duplicate", "crowded", "twins"),
}


def negative_word_slots() -> dict[str, list[str]]:
    """Return the words by slot of a negative prompt, each slot with the words of several kinds."""
    kinds, size = list(NEGATIVE_WORDS), len(NEGATIVE_WORDS) // SLOTS
    groups = [kinds[i : i + size] for i in range(0, len(kinds), size)]
    return {" and ".join(group): [word for kind in group for word in NEGATIVE_WORDS[kind]] for group in groups}
