# SPDX-License-Identifier: Apache-2.0
"""Model cards: metadata for the Hub and scores, made from the files that evaluations write."""

import json
from pathlib import Path

import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
    parse_eval_result_entries,
)

from .checkpoints import CHECKPOINTS, read_json

RESULTS_BEGIN, RESULTS_END = "<!-- results -->", "<!-- /results -->"
PIPELINE_TAGS = {  # of what a head is for, where the checkpoint is not one of the above
    "ForMaskedLM": "fill-mask",
    "LMHeadModel": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "Model": "feature-extraction",
}
METRICS = {"accuracy": "Accuracy", "f1": "F1", "perplexity": "Perplexity"}


def _scores(path, name):
    """(report, {what was evaluated: its result}) of the JSON file that an evaluation wrote for the model `name`."""
    report = read_json(path, "the results")
    results = report.get("results")
    scored = {
        key: result
        for key, result in (results.items() if isinstance(results, dict) else ())
        if isinstance(result, dict) and any(metric in result for metric in METRICS)
    }
    if not scored or "task" not in report:
        raise ValueError(
            f'{path} has no scores: expected what an evaluation script writes as all_results.json, {{"task": ..., '
            f'"model": ..., "results": {{name: {{metric: number}}}}}} with a metric out of {", ".join(METRICS)}'
        )
    evaluated = Path(str(report.get("model"))).name
    if evaluated != name:
        raise ValueError(f"{path} holds the scores of {evaluated}, not of {name}; evaluate this checkpoint first")
    return report, scored


def _eval_results(report, scored, pipeline_tag, title):
    for key, result in scored.items():
        for metric in (metric for metric in METRICS if metric in result):
            details = {name: result[name] for name in ("ci95", "num_samples") if name in result}
            yield EvalResult(
                task_type=pipeline_tag or "other",
                dataset_type=report["task"],
                dataset_name=f"{title} ({key})",
                dataset_config=key,
                dataset_split=result.get("source"),
                metric_type=metric,
                metric_value=result[metric],
                metric_name=METRICS[metric],
                metric_args=details or None,
            )


def _write_eval_results(folder, report, scored, dataset, source):
    """Write the scores where the Hub looks for those of the benchmark `dataset`; None: that of the present file.

    Of every result its first metric, under its name as the task of the benchmark.
    """
    path = folder / ".eval_results" / f"{report['task']}.yaml"
    if dataset is None and path.is_file():
        present = parse_eval_result_entries(yaml.safe_load(path.read_text("utf-8")))
        dataset = present[0].dataset_id if present else None
    if dataset is None:
        return
    entries = []
    for key, result in scored.items():
        metric = next(metric for metric in METRICS if metric in result)
        notes = f"{METRICS[metric]}, {result['num_samples']} samples" if "num_samples" in result else METRICS[metric]
        notes += f", from {source}"
        entries.append(EvalResultEntry(dataset_id=dataset, task_id=key, value=result[metric], notes=notes))
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False), "utf-8")


def _table(report, scored, source):
    lines = ["| data | metric | score | 95% interval | samples |", "|---|---|---|---|---|"]
    for key, result in scored.items():
        for metric in (metric for metric in METRICS if metric in result):
            low, high = result.get("ci95") or (None, None)
            interval = f"{low:.4f} to {high:.4f}" if low is not None else ""
            data = f"{key}, {result['source']}" if result.get("source") else key
            samples = result.get("num_samples", "")
            lines.append(f"| {data} | {METRICS[metric]} | {result[metric]:.4f} | {interval} | {samples} |")
    versions = [f"{name} {version}" for name, version in report.get("versions", {}).items()]
    where = [str(report[key]) for key in ("device", "dtype") if report.get(key)]
    conditions = f" ({', '.join(where + versions)})" if where or versions else ""
    return "\n".join([*lines, "", f"From `{source}`{conditions}."])


def _usage(config, name):
    head = (config.get("architectures") or ["Model"])[0]
    auto = next(
        (f"AutoModel{tag}" for tag in PIPELINE_TAGS if tag.startswith("For") and head.endswith(tag)), "AutoModel"
    )
    auto = "AutoModelForCausalLM" if head.endswith("LMHeadModel") else auto
    load = f'model = transformers.{auto}.from_pretrained("{name}")'
    return f"```python\nimport flash_models\nimport transformers\n\n{load}\n```"


def _body(folder, config, shipped):
    positions = config.get("max_position_embeddings", config.get("n_positions"))
    tokens = shipped.max_tokens if shipped else positions
    summary = f"{shipped.title}: {shipped.task}." if shipped else "A BERT- or GPT-2-class model with a long context."
    parts = [f"# {folder.name}", f"{summary} It takes {tokens:,} tokens.", "## Use", _usage(config, folder.name)]
    parts.append("Needs the library flash-models. Its attention: [FlashAttention](https://arxiv.org/abs/2205.14135).")
    if config.get("block_sparse"):
        parts.append(f"Attention is block-sparse: `{json.dumps(config['block_sparse'])}`.")
    parts += ["## Results", RESULTS_BEGIN, RESULTS_END]
    if shipped:
        command = f"eval/recipes/{shipped.name}.sh\npython {shipped.script} --model_name_or_path {shipped.folder}"
        parts += ["## Train and evaluate", f"```sh\n{command}\n```"]
    return "\n\n".join(parts) + "\n"


def write_card(folder, results=None, license=None, dataset=None):
    """Write or update `folder`/README.md: metadata for the Hub, and the scores in `results`, a JSON file. Returns its
    path.

    What a person wrote stays: text outside of the lines between "<!-- results -->" and "<!-- /results -->", and
    metadata fields that are set. Scores come from the file alone, never from an older card. dataset: the benchmark on
    the Hub, ORG/NAME, that the scores belong to; they are then written to `folder`/.eval_results too.
    """
    if dataset is not None and (results is None or dataset.count("/") != 1):
        raise ValueError(f"a benchmark is named ORG/NAME and needs the scores of a results file; got {dataset!r}")
    folder = Path(folder).resolve()
    config = read_json(folder / "config.json", "the configuration")
    shipped = CHECKPOINTS.get(folder.name)
    path = folder / "README.md"
    written = path.is_file() and path.read_text("utf-8").strip()
    card = ModelCard.load(path) if written else ModelCard("---\n{}\n---\n" + _body(folder, config, shipped))
    data = card.data
    data.license = license or data.license or (shipped.license if shipped else None)
    if not data.license:
        raise ValueError(f"the licence of {folder.name} is not known; name it with --license, such as apache-2.0")
    head = (config.get("architectures") or [""])[0]
    tag = next((tag for ending, tag in PIPELINE_TAGS.items() if head.endswith(ending)), None)
    data.pipeline_tag = data.pipeline_tag or (shipped.pipeline_tag if shipped else tag)
    data.library_name = data.library_name or "transformers"
    kinds = ["flash-models", "long-context", *(["block-sparse"] if config.get("block_sparse") else [])]
    data.tags = [*(data.tags or []), *(kind for kind in kinds if kind not in (data.tags or []))]
    if results is not None:
        report, scored = _scores(results, folder.name)
        data.model_name = folder.name
        title = shipped.title if shipped else report["task"]
        data.eval_results = list(_eval_results(report, scored, data.pipeline_tag, title))
        if RESULTS_BEGIN not in card.text or RESULTS_END not in card.text:
            card.text = f"{card.text.rstrip()}\n\n## Results\n\n{RESULTS_BEGIN}\n\n{RESULTS_END}\n"
        before, _, rest = card.text.partition(RESULTS_BEGIN)
        after = rest.partition(RESULTS_END)[2]
        table = _table(report, scored, _shown(results))
        card.text = f"{before}{RESULTS_BEGIN}\n\n{table}\n\n{RESULTS_END}{after}"
        _write_eval_results(folder, report, scored, dataset, _shown(results))
    ModelCardData(**data.to_dict())  # raises if the metadata would not load again
    card.save(path)
    return path


def _shown(path):
    """`path` as the card names it: from the repository's root on, and never with the folders of this machine."""
    parts = Path(path).resolve().parts
    return "/".join(parts[len(parts) - parts[::-1].index("eval") - 1 :]) if "eval" in parts else parts[-1]
