"""One run of the pretraining comparison: its settings, its training loop, and what it measures."""

import hashlib
import math
import platform
import statistics
import time
from dataclasses import asdict, dataclass, field

import peft
import torch
import torch.nn.functional as F
import transformers

import poet_peft

from .llama import kinds_of_layers, targeted_layers
from .poet_variants import grow
from .quality_methods import METHODS, build, is_poet


BATCH_SIZE = 4
MIN_LR = 0.01  # of the peak
MAX_NORM = 1.0
TRAIN_LOG, HELD_OUT_LOG = 10, 100  # steps
NUM_CURVE = 64  # held-out sequences of the loss curve; the loss at the end is that of all
_LONGEST_NAME = 245  # a file has at most 255 characters, with its ending


@dataclass(frozen=True)
class Run:
    """The settings of a run. Seed: of the order of the data and of the initial weights, equal for all methods.

    Attributes:
        method: a key of `METHODS`.
        lr: peak learning rate of everything but the linear layers: embeddings, norms and head.
        matrix_lr: peak learning rate of the linear layers, or of what a method trains in them; of "poet-ortho" the
            angle of a step in radians, None = by the angle law. None where the method trains none.
        size: a key of `SIZES`.
        data: "stdlib" or "gsm8k".
        steps: of BATCH_SIZE sequences.
        weight_decay: of matrices, the head among them; never of embeddings, norms and rotations.
        warmup: share of the steps in which the learning rates rise.
        betas: of AdamW.
        base_init: initial weights of the linear layers, see `POETConfig`, or "usual", the model's own.
        options: a method's own settings, "config.NAME" of its PEFT configuration, "optimizer.NAME" of the optimizer of
            its linear layers, "groups.NAME" of `poet_param_groups`, "init.scale" and "init.scale_pattern" of the
            initial weights of methods other than POET, and "variant.NAME" of `poet_variants`: "spectra", "gains" and
            "angles", "growth", by how much weights grow over the angle of each step, "growth_pattern", its factors by
            the layer, "shrinking", the power of their size by which angles are divided then (1 unless given),
            "angle_power", of the schedule as the angles follow it, and "max_angle", at which the angle law is cut in
            every step, instead of once before the schedule. Unless "optimizer.NAME" says otherwise, the momentum of
            "poet-ortho" is 0.95 and its sides are not decorrelated.
    """

    method: str
    lr: float
    matrix_lr: float | None = None
    size: str = "4m"
    data: str = "stdlib"
    steps: int = 400
    seed: int = 42
    weight_decay: float = 0.01
    warmup: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    base_init: str = "normalized"
    options: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is unknown; choose one of {', '.join(METHODS)}.")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup={self.warmup} is a share of the steps, at least 0 and below 1.")
        object.__setattr__(self, "betas", tuple(self.betas))  # JSON has lists

    @property
    def name(self):
        """Of its result file, in the folder of its size and data."""
        rates = [] if self.matrix_lr is None else [f"m{self.matrix_lr:g}"]
        rates.append(f"lr{self.lr:g}")
        options = [f"{key.partition('.')[2]}={_in_name(value)}" for key, value in sorted(self.options.items())]
        beta1, beta2 = self.betas
        others = [f"wd{self.weight_decay:g}", f"wu{self.warmup:g}", f"b{beta1:g}-{beta2:g}", self.base_init]
        name = "_".join([self.method, str(self.steps), f"s{self.seed}", *rates, *others, *options])
        if len(name) <= _LONGEST_NAME:
            return name
        digest = hashlib.sha256(name.encode()).hexdigest()[:16]
        return f"{name[: _LONGEST_NAME - len(digest) - 1]}_{digest}"

    @property
    def family(self):
        """What the run is a run of: the method and its variant."""
        if any(key.startswith("variant.") for key in self.options):
            return f"{self.method}-variant"
        variant = {"block_stochastic": "-bs", "fully_stochastic": "-fs"}.get(self.options.get("config.variant"), "")
        if "config.block_size" in self.options:
            variant += f"-b{self.options['config.block_size']}"
        return self.method + variant


def _in_name(value):
    """An option's value as part of a file's name, on any system."""
    if not isinstance(value, dict):
        return value
    return ",".join(f"{key.replace('|', '+')}-{part}" for key, part in sorted(value.items()))


def schedule(step, run):
    """What the learning rates are multiplied by at a step, counted from 0: linear warm-up, then cosine to MIN_LR."""
    num_warmup = round(run.warmup * run.steps)
    if step < num_warmup:
        return (step + 1) / num_warmup
    progress = (step - num_warmup) / (run.steps - num_warmup)
    return MIN_LR + (1 - MIN_LR) * (1 + math.cos(math.pi * progress)) / 2


def batches(sequences, run):
    """A batch (BATCH_SIZE, length) for each step, every sequence once before any comes again."""
    generator = torch.Generator().manual_seed(run.seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(run.steps):
        if len(order) < BATCH_SIZE:
            order = torch.cat([order, torch.randperm(len(sequences), generator=generator)])
        yield sequences[order[:BATCH_SIZE]]
        order = order[BATCH_SIZE:]


@torch.no_grad()
def evaluate(model, sequences):
    """The loss of each token but the first, in nats (sequences, length - 1)."""
    model.eval()
    losses = []
    for ids in sequences.split(BATCH_SIZE):
        logits = model(input_ids=ids).logits[:, :-1].float()
        losses.append(F.cross_entropy(logits.mT, ids[:, 1:], reduction="none"))
    model.train()
    return torch.cat(losses)


def repeats_a_pair(sequences):
    """Which tokens but the first follow a token that they have followed before in their sequence.

    Attention can copy them from there: the associative recall of arXiv 2312.04927.

    Returns:
        Booleans (sequences, length - 1).
    """
    pairs = torch.stack([sequences[:, :-1], sequences[:, 1:]], 2)
    return (pairs[:, :, None] == pairs[:, None]).all(3).tril(-1).any(2)


def measure(run, tokens, observe=None):
    """Trains, and returns what goes into the result file.

    A run diverged, and is ended, where its loss is not finite or twice that of guessing.

    Args:
        observe: function of the model and the number of steps so far, called before the first and after each.
    """
    torch.set_num_threads(1)
    model, optimizers = build(run, tokens)
    parameters = count_parameters(model, optimizers)
    fate = METHODS[run.method].singular_values
    before = singular_values(model) if fate else None
    trained = _train(run, tokens, model, optimizers, observe or (lambda model, step: None))
    result = {"run": asdict(run), "family": run.family, "loss": None, "loss_se": None, **trained}
    if trained["diverged"] is None:
        losses = evaluate(model, tokens.held_out).mean(1)
        result["loss"] = round(losses.mean().item(), 5)
        result["loss_se"] = round((losses.std() / len(losses) ** 0.5).item(), 5)
        result["losses"] = [round(loss, 4) for loss in losses.tolist()]
        result["held_out_tokens"] = losses.numel() * (tokens.held_out.shape[1] - 1)
        if fate == "kept":
            if is_poet(run.method):
                model.merge_adapter()
            after = singular_values(model)
            if "variant.growth" in run.options:
                before, after = ([values / values.norm() for values in spectra] for spectra in (before, after))
            result["drift"] = drift(before, after)
        if fate == "trained":
            result["spectra"] = spectra(before, singular_values(model), kinds_of_layers(model))
    modules = torch, transformers, peft, poet_peft
    versions = {m.__name__: m.__version__ for m in modules} | {"python": platform.python_version()}
    return result | {"parameters": parameters, "versions": versions, "hardware": poet_peft.hardware()}


def count_parameters(model, optimizers):
    """Of the plain model, of its linear layers but the head, and of what is trained."""
    adapted = [module for module in model.modules() if hasattr(module, "base_layer")]
    added = sum(p.numel() for module in adapted for p in module.parameters()) - sum(
        p.numel() for module in adapted for p in module.base_layer.parameters()
    )
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return {
        "model": sum(p.numel() for p in model.parameters()) - added,
        "linear": sum(layer.weight.numel() for layer in plain_layers(model)),
        "trained": sum(p.numel() for group in groups for p in group["params"]),
    }


def plain_layers(model):
    """The linear layers but the head, without their adapters."""
    return [getattr(layer, "base_layer", layer) for layer in targeted_layers(model)]


def _train(run, tokens, model, optimizers, observe):
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    parameters = [parameter for group in groups for parameter in group["params"]]
    in_linear = [parameter for layer in targeted_layers(model) for parameter in layer.parameters()]
    limit = 2 * math.log(tokens.vocab_size)
    angle_power, max_angle = run.options.get("variant.angle_power", 1), run.options.get("variant.max_angle", math.inf)
    shrinking = run.options.get("variant.shrinking", 1)
    held_out = tokens.held_out[:NUM_CURVE]
    repeated = repeats_a_pair(held_out)
    wall, cpu, losses, curve, repeat_curve = [], [], [], [], []
    gradient_bytes = diverged = None
    observe(model, 0)
    for step, ids in enumerate(batches(tokens.train, run)):
        start = time.perf_counter(), time.process_time()
        part = schedule(step, run)
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = min(peak * part**angle_power, max_angle) if "blocks" in group else peak * part
            group["lr"] /= group.get("size", 1.0) ** shrinking
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if gradient_bytes is None:
            gradient_bytes = sum(p.grad.nbytes for p in in_linear if p.grad is not None)
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        grow(groups)
        losses.append(loss.item())
        wall.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
        if not losses[-1] < limit:
            diverged = step + 1
            break
        observe(model, step + 1)
        if (step + 1) % HELD_OUT_LOG == 0:
            by_token = evaluate(model, held_out)
            parts = by_token, by_token[repeated], by_token[~repeated]
            mean, *of_parts = [round(part.mean().item(), 4) for part in parts]
            curve.append([step + 1, mean])
            repeat_curve.append([step + 1, *of_parts])
    states = [state for optimizer in optimizers for p, state in optimizer.state.items() if _is_in(p, in_linear)]
    return {
        "diverged": diverged,
        "held_out_curve": curve,
        "repeat_curve": repeat_curve,
        "train_curve": [
            [step, round(statistics.mean(losses[step - TRAIN_LOG : step]), 4)]
            for step in range(TRAIN_LOG, len(losses) + 1, TRAIN_LOG)
            if diverged is None
        ],
        "train_seconds": round(sum(wall), 1),
        "train_cpu_seconds": round(sum(cpu), 1),
        "step_seconds": round(statistics.median(wall), 4),
        "step_cpu_seconds": round(statistics.median(cpu), 4),
        "gradient_bytes": gradient_bytes,
        "optimizer_bytes": sum(t.nbytes for state in states for t in _tensors(state) if t.dim()),
        "tokens": len(losses) * BATCH_SIZE * tokens.train.shape[1],
    }


def _tensors(state):
    """Those of an optimizer's state of a parameter, and of the objects in it."""
    held = [[value] if torch.is_tensor(value) else getattr(value, "__dict__", {}).values() for value in state.values()]
    return [value for values in held for value in values if torch.is_tensor(value)]


def _is_in(tensor, tensors):
    return any(tensor is other for other in tensors)


def singular_values(model):
    """Of every linear weight but the head's, in fp64."""
    return [torch.linalg.svdvals(layer.weight.detach().double()) for layer in plain_layers(model)]


def spectra(before, after, kinds):
    """Sizes and shapes of the spectra of each kind of layer, `[at the start, at the end]`, means over the layers.

    Returns:
        {kind: {"rms": of the singular values, "largest" and "median": over it}}
    """

    def rms(values):
        return values.square().mean().sqrt()

    measures = {
        "rms": rms,
        "largest": lambda values: values[0] / rms(values),
        "median": lambda values: values.median() / rms(values),
    }
    found = {}
    for kind in dict.fromkeys(kinds):
        layers = [place for place, other in enumerate(kinds) if other == kind]
        found[kind] = {
            name: [round(statistics.mean(measure(state[i]).item() for i in layers), 4) for state in (before, after)]
            for name, measure in measures.items()
        }
    return found


def drift(before, after):
    """The largest change of a singular value, over that value itself and over the layer's largest."""
    pairs = [(old, (new - old).abs()) for old, new in zip(before, after, strict=True)]
    return {
        "relative": float(f"{max((change / old).max().item() for old, change in pairs):.3g}"),
        "of_largest": float(f"{max((change / old[0]).max().item() for old, change in pairs):.3g}"),
    }
