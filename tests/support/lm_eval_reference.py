"""lm-eval 0.4.13 on local files: `python lm_eval_reference.py SPEC.json`, in a process of its own.

Prompts, few-shot choice, metrics and groups are lm-eval's shipped YAML; only where the documents come from is replaced
by JSON files, with the integer labels of the Hugging Face data sets.

SPEC: {"data", "out", "runs": {name: {"model", "shots": N or null, "tasks": [...]}}}.
OUT: {name: {"results": {task: {metric: value}}, "samples": {task: [...]}}}.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}

FOLDERS = ("mmlu/default", "kobest", "japanese_leaderboard")
NAMES = {"marc_ja": "ja_leaderboard_marc_ja"}  # ours -> lm-eval's


def main(spec):
    out = Path(spec["out"])
    os.environ["HF_HOME"] = str(out.parent / "hf")

    import torch
    from lm_eval import evaluator
    from lm_eval import tasks as shipped
    from lm_eval.api.group import Group
    from lm_eval.config.group import GroupConfig
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks._yaml_loader import load_yaml
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    folders = [Path(shipped.__file__).parent / folder for folder in FOLDERS]
    manager = shipped.TaskManager(include_path=folders, include_defaults=False)
    data = Path(spec["data"])

    def task(name, tag=None):
        config = {"task": NAMES.get(name, name), "dataset_path": "json", "dataset_name": None}
        files = {path.stem: str(path) for path in sorted((data / name).glob("*.json"))}
        config["dataset_kwargs"] = {"data_files": files}
        if name == "marc_ja":  # lm-eval's file has acc only
            config["metric_list"] = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in METRICS]
        return manager._factory.build(manager.task_index[config["task"]], overrides=config, registry={})

    def group(name):
        """lm-eval's group of those of its tasks that have data."""
        config = load_yaml(manager.task_index[name].yaml_path)
        made = Group.from_config(GroupConfig(**{key: value for key, value in config.items() if key != "task"}))
        for member in config["task"]:
            entry = manager.task_index[member]
            children = sorted(entry.tags) if entry.kind.name == "TAG" else [member]
            for child in children:
                if manager.task_index[child].kind.name == "GROUP":
                    made.add(group(child))
                elif (data / child).is_dir():
                    made.add(task(child))
        return made

    results = {}
    for name, run in spec["runs"].items():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(run["model"])
        model = AutoModelForCausalLM.from_pretrained(run["model"], dtype=torch.float32)
        lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=4, device="cpu")
        tasks = [group(task_) if task_ in ("mmlu", "kobest") else task(task_) for task_ in run["tasks"]]
        shots = run["shots"]
        if shots is None:  # MMLU's five are an option in lm-eval, the others' are in their files
            for made in tasks:
                for leaf in made.get_all_tasks() if isinstance(made, Group) else [made]:
                    if leaf.task_name.startswith("mmlu_"):
                        leaf.set_config("num_fewshot", 5)
        made = evaluator.simple_evaluate(
            lm, tasks=tasks, num_fewshot=shots, bootstrap_iters=0, task_manager=manager, log_samples=True
        )
        ours = {theirs: name for name, theirs in NAMES.items()}
        results[name] = {
            "results": {
                ours.get(task_, task_): {key.split(",")[0]: value for key, value in figures.items() if "," in key}
                for task_, figures in (made["results"] | (made.get("groups") or {})).items()
            },
            "samples": {
                ours.get(task_, task_): [
                    {
                        "context": sample["arguments"][0][0],
                        "choices": [choice for _, choice in sample["arguments"]],
                        "loglikelihoods": [float(answer[0]) for answer in sample["filtered_resps"]],
                    }
                    for sample in sorted(samples, key=lambda sample: sample["doc_id"])
                ]
                for task_, samples in made["samples"].items()
            },
        }
    out.write_text(json.dumps(results, ensure_ascii=False))


METRICS = ("acc", "acc_norm")

if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
