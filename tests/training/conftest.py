"""Tiny models, tokenizers and data, and run files on them."""

from tiny_runs import (  # noqa: F401
    image_encoder_folder,
    prompt_jsonl,
    review_csv,
    run_file,
    tiny_classifier_folder,
    tiny_decoder_folder,
    wide_decoder,
)
