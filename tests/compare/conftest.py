"""Tiny models and run files, as the tests of training have them."""

from tiny_runs import (  # noqa: F401
    prompt_jsonl,
    review_csv,
    run_file,
    tiny_classifier_folder,
    tiny_decoder_folder,
)
