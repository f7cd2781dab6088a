"""Protocols that scores were published by, and these scores."""

COCO30K = (
    *("--resolution", "512", "--resize", "256", "--sampler", "pndm"),
    *("--num_inference_steps", "25", "--guidance_scale", "7.5"),
)
"""How BK-SDM (Kim et al., 2023, arXiv 2305.15798) makes images of 30,000 prompts of MS-COCO's validation set of 2014.

Its own code draws all noise from one generator, in fp16, and keeps JPEGs; here each image has a seed, and none is
compressed. By its README, scores of one model differ by 0.2 in FID from draw to draw."""

COCO30K_CLIP = "laion/CLIP-ViT-g-14-laion2B-s34B-b88K"
"""The CLIP that it scores by."""

COCO30K_SOURCE = (
    "published by github.com/Nota-NetsPresso/BK-SDM, MODEL_CARD.md: MS-COCO validation set of 2014, 30,000 prompts, "
    "512 to 256 pixels, PNDM, 25 steps, guidance 7.5; FID to all 41,000 images"
)


def _row(fid: float, inception_score: float, clip_score: float) -> dict[str, float]:
    clip = f"clip_score_{COCO30K_CLIP.split('/')[1].replace('-', '_')}"
    return {"fid": fid, "inception_score": inception_score, clip: clip_score}


COCO30K_ROWS = {
    "Stable Diffusion v1.4 (published)": _row(13.05, 36.76, 29.58),
    "BK-SDM-Base (published)": _row(15.76, 33.79, 28.78),
    "BK-SDM-Small (published)": _row(16.98, 31.68, 26.77),
    "BK-SDM-Tiny (published)": _row(17.12, 30.09, 26.53),
}
"""Rows for results.json; CLIP scores times 100, as here."""
