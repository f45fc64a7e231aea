"""Results for tests, without training anything."""

from typing import Any

from shoestring.compare.results import SCHEMA_VERSION, MetaInfo, Own, Result, RunInfo, TrainInfo


def made_result(
    name: str = "lora", seed: int = 0, recipe: str = "- lora: {}\n", model: str = "tiny", **own: Any
) -> Result:
    """A finished run, of text classification if nothing else is said; `own` goes into the part that is ours."""
    values = own.pop("values", {"accuracy": 0.8, "peak_bytes": 1000.0, "step_seconds": 0.5})
    return Result(
        run_info=RunInfo(
            created_at="2026-01-01T00:00:00+00:00",
            total_time=3.5,
            experiment_name=f"{name}/seed{seed}",
            train_config={"model_id": model, "seed": seed},
        ),
        train_info=TrainInfo(train_time=2.0, num_trainable_params=10, num_total_params=100),
        meta_info=MetaInfo(package_info={"torch-version": "2.13.0"}, system_info={"machine": "x86_64"}),
        shoestring=Own(
            schema_version=SCHEMA_VERSION,
            task=own.pop("task", "text-classification"),
            name=name,
            seed=seed,
            digest=own.pop("digest", f"{name}{seed}"),
            of_all_seeds=own.pop("of_all_seeds", name),
            run_file="model: tiny\n",
            recipe=recipe,
            values=values,
            **own,
        ),
    )


def of_peft_in_2025(name: str = "lora/rank32") -> dict[str, Any]:
    """The same with the fields that its files had before they knew other accelerators."""
    values = of_peft(name)
    info = values["train_info"]
    for field in ("reserved_avg", "max", "reserved_99th"):
        info[f"cuda_memory_{field}"] = info.pop(f"accelerator_memory_{field}")
    values["meta_info"]["system_info"]["gpu"] = values["meta_info"]["system_info"].pop("accelerator")
    return values


def of_peft_on_images(name: str = "lora/flux2-klein-default", similarity: float = 0.7) -> dict[str, Any]:
    """A result of its comparison on generated images."""
    values = of_peft(name)
    values["train_info"]["metrics"] = [
        {"step": 100, "valid dino_similarity": 0.72, "train loss": 0.77, "train samples": 200},
        {"step": 750, "test dino_similarity": similarity, "drift": 0.26, "train loss": 0.73, "train samples": 1500},
    ]
    values["meta_info"]["dataset_info"] = {"sha": "def", "created_at": "2026-03-09"}
    return values


def of_peft(name: str = "lora/rank32", accuracy: float = 0.48) -> dict[str, Any]:
    """A result in the form of peft's method comparison, with a field that only a later version has."""
    return {
        "run_info": {
            "created_at": "2026-01-01T00:00:00+00:00",
            "total_time": 1153.3,
            "experiment_name": name,
            "peft_branch": "main",
            "peft_worktree_is_dirty": False,
            "train_config": {"model_id": "some/model", "seed": 0, "max_steps": 5000},
            "peft_config": {"peft_type": "LORA", "r": 32},
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": 14_000_000_000,
            "accelerator_memory_max": 22_000_000_000,
            "accelerator_memory_reserved_99th": 20_000_000_000,
            "train_time": 900.0,
            "file_size": 36_000_000,
            "num_trainable_params": 9_000_000,
            "num_total_params": 3_200_000_000,
            "status": "success",
            "metrics": [
                {"step": 250, "valid accuracy": 0.32, "train loss": 0.98},
                {"step": 5000, "test accuracy": accuracy, "train total tokens": 4_500_000, "forgetting": 0.05},
            ],
        },
        "meta_info": {
            "model_info": {"sha": "abc", "created_at": "2024-09-18"},
            "dataset_info": {"metamath": {"sha": "def", "created_at": "2023-09-21"}},
            "package_info": {"peft-version": "0.21.2", "peft-commit-hash": None},
            "system_info": {"system": "Linux", "accelerator": "some GPU"},
            "pytorch_info": "PyTorch built with: ...",
        },
    }
