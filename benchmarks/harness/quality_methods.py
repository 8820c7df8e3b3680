"""The methods of the pretraining comparison: each makes of a plain Llama the model it trains, and its optimizers."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from peft import LoraConfig, get_peft_model

from poet_peft import AngleLaw, POETConfig, RotationMuon, initialize_base_weights, poet_param_groups
from poet_peft.maths.newton_schulz import has_bfloat16_products
from poet_peft.weights.initial import scale_of

from .llama import PRESETS, llama, targeted_layers
from .poet_variants import AnglesByLayer, add_gains, change_spectra, let_grow


# Parameters with a vocabulary of 2,048: 1.3, 4.2 and 14.7 million.
SIZES = {"1m": (128, 344, 4, 4), "4m": PRESETS["20m"], "15m": (512, 1376, 4, 8), "tiny": PRESETS["tiny"]}

# Settings of "poet-ortho" that a run without the option "optimizer.NAME" has, whatever the package's defaults are.
ORTHO_UNLESS_SAID = {"momentum": 0.95, "decorrelation": 0.0}
# And the angle law of a run without an angle.
ANGLE_LAW = AngleLaw(max_angle=0.024)


def build(run, tokens):
    """The model, ready to train, and its optimizers, whose groups have the peak learning rates."""
    torch.manual_seed(run.seed)
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokens.eos_token_id)
    model = llama(SIZES[run.size], tokens.vocab_size, tokens.train.shape[1], **special)
    if not is_poet(run.method):
        draw_initial_weights(model, run)
    model, optimizers = METHODS[run.method].build(model, run)
    model.train()
    return model, optimizers


def draw_initial_weights(model, run):
    """Those of a method that has no such settings of its own, by the options "init.NAME"."""
    scales = options(run, "init")
    if run.base_init != "usual":
        initialize_base_weights(model, run.base_init, seed=run.seed, **scales)
        return
    scale, pattern = scales.get("scale", 1.0), scales.get("scale_pattern", {})
    names = {layer: name for name, layer in model.named_modules()}
    with torch.no_grad():
        for layer in targeted_layers(model):
            layer.weight.mul_(scale_of(names[layer], scale, pattern))


def is_poet(method):
    return method.startswith("poet-")


def options(run, kind):
    """The run's options of one kind: {NAME: value} of "KIND.NAME"."""
    parts = {key: key.partition(".") for key in run.options}
    return {name: run.options[key] for key, (before, _, name) in parts.items() if before == kind}


def frozen(model, run):
    for weight in linear_weights(model):
        weight.requires_grad_(False)
    return model, [adamw(rest_groups(model, run), run)]


def full_adamw(model, run):
    linear = {"params": linear_weights(model), "lr": run.matrix_lr, "weight_decay": run.weight_decay}
    return model, [adamw([linear, *rest_groups(model, run)], run)]


def muon(model, run):
    """torch's Muon, but for its bfloat16 on CPUs without instructions for it, which are several times slower then."""
    if not has_bfloat16_products(torch.device("cpu")):
        torch.optim._muon._zeropower_via_newtonschulz = newton_schulz_of_muon
    settings = {"lr": run.matrix_lr, "weight_decay": run.weight_decay, **options(run, "optimizer")}
    return model, [torch.optim.Muon(linear_weights(model), **settings), adamw(rest_groups(model, run), run)]


def newton_schulz_of_muon(grad, coefficients, num_steps, eps):
    """What torch's Muon computes of a gradient (out, in), in the gradient's own precision."""
    a, b, c = coefficients
    X = grad / grad.norm().clamp(min=eps)
    X = X.T if len(grad) > len(grad.T) else X
    for _ in range(num_steps):
        gram = X @ X.T
        X = torch.addmm(X, torch.addmm(gram, gram, gram, beta=b, alpha=c), X, beta=a)
    return X.T if len(grad) > len(grad.T) else X


def galore(model, run):
    """GaLore's AdamW (arXiv 2403.03507): moments in the space of the gradient's largest singular vectors.

    Rank, interval and scale are the paper's for a model of this width.
    """
    from galore_torch import GaLoreAdamW

    settings = {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std", **options(run, "optimizer")}
    linear = {"params": linear_weights(model), "lr": run.matrix_lr, "weight_decay": run.weight_decay, **settings}
    optimizer = GaLoreAdamW([linear], betas=run.betas, no_deprecation_warning=True)
    return model, [optimizer, adamw(rest_groups(model, run), run)]


def lora(model, run):
    rest = rest_groups(model, run)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", **options(run, "config")))
    adapters = [p for name, p in model.named_parameters() if ".lora_" in name]
    for group in rest:
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    return model, [adamw([{"params": adapters, "lr": run.matrix_lr, "weight_decay": run.weight_decay}, *rest], run)]


def poet_paper(model, run):
    model = poet_model(model, run, recipe="paper")
    groups = poet_param_groups(model, lr=run.lr, poet_lr=run.matrix_lr, weight_decay=run.weight_decay)
    return model, [adamw(groups, run)]


def poet_ortho(model, run):
    model = poet_model(model, run, recipe="ortho")
    groups = ortho_groups(model, run)
    variant = options(run, "variant")
    if "spectra" in variant:
        change_spectra(model, variant["spectra"])
    if "gains" in variant:
        groups.append({"params": add_gains(model, variant["gains"]), "lr": run.lr, "weight_decay": 0.0})
    if "growth" in variant:
        groups = let_grow(model, groups, variant["growth"], variant.get("growth_pattern", {}))
    settings = {"betas": run.betas, **ORTHO_UNLESS_SAID, **options(run, "optimizer")}
    return model, [RotationMuon(groups, **settings)]


def poet_ortho_adamw(model, run):
    model = poet_model(model, run, recipe="ortho")
    return model, [adamw(ortho_groups(model, run), run)]


def ortho_groups(model, run):
    angle = ANGLE_LAW if run.matrix_lr is None else run.matrix_lr
    variant = options(run, "variant")
    if "angles" in variant:
        angle = AnglesByLayer(run.matrix_lr, variant["angles"])
    if "max_angle" in variant:
        angle = AngleLaw(max_angle=math.inf)
    settings = {"lr": run.lr, "weight_decay": run.weight_decay, "angle": angle, **options(run, "groups")}
    return poet_param_groups(model, **settings)


def poet_model(model, run, **settings):
    base_init = None if run.base_init == "usual" else run.base_init
    settings |= {"base_init": base_init, "seed": run.seed, **options(run, "config")}
    return get_peft_model(model, POETConfig.for_pretraining(**settings))


def linear_weights(model):
    return [layer.weight for layer in targeted_layers(model)]


def rest_groups(model, run):
    """Everything but the linear layers. As with `poet_param_groups` only the head decays."""
    head = model.get_output_embeddings().weight
    others = {id(parameter) for parameter in [*linear_weights(model), head]}
    return [
        {"params": [head], "lr": run.lr, "weight_decay": run.weight_decay},
        {"params": [p for p in model.parameters() if id(p) not in others], "lr": run.lr, "weight_decay": 0.0},
    ]


def adamw(groups, run):
    return torch.optim.AdamW(groups, betas=run.betas, fused=True)


class Method(NamedTuple):
    """How a method is built, and what becomes of the singular values of the linear layers' own weights."""

    build: Callable
    singular_values: Literal["kept", "trained"] | None = None


METHODS = {
    "frozen": Method(frozen, "kept"),
    "adamw": Method(full_adamw, "trained"),
    "muon": Method(muon, "trained"),
    "galore": Method(galore, "trained"),
    "lora": Method(lora),
    "poet-paper": Method(poet_paper, "kept"),
    "poet-ortho": Method(poet_ortho, "kept"),
    "poet-ortho-adamw": Method(poet_ortho_adamw, "kept"),
}
