"""Llamas with random weights, trained by any of the methods."""

import warnings

import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import LlamaConfig, LlamaForCausalLM

from poet_peft import POETConfig, RotationMuon, merge_and_reinitialize, poet_param_groups

from .formulas import adamw_held, adapter_held, fully_stochastic_parameters, poet_parameters
from .memory import measure_memory, module_tensors, storage_bytes
from .methods import adamw, adapter_config, autocast, folds_every_step, is_poet, trainable
from .timing import Clock, quartiles


# Hidden size, intermediate size, layers, heads: the Llamas of the POET paper, and GaLore's 20m. Their names count a
# vocabulary of 32,000; with 2,048, 20m has 4.2 million parameters. "tiny" is for --quick.
PRESETS = {
    "tiny": (32, 48, 2, 2),
    "20m": (256, 688, 4, 4),
    "60m": (512, 1376, 8, 8),
    "130m": (768, 2048, 12, 12),
    "350m": (1024, 2736, 24, 16),
    "1.3b": (2048, 5461, 24, 32),
}
MERGE_INTERVAL = 400
_LR = 1e-5


def llama(sizes, vocab_size, seq_length, **settings):
    """A Llama of a preset's sizes; `settings` go to its `LlamaConfig`."""
    hidden_size, intermediate_size, num_layers, num_heads = sizes
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_heads,
            vocab_size=vocab_size,
            max_position_embeddings=seq_length,
            use_cache=False,
            **settings,
        )
    )


def linear_shapes(sizes):
    """(out, in) of all linear layers but the output head."""
    hidden, intermediate, num_layers, _ = sizes
    return num_layers * [*4 * [(hidden, hidden)], *2 * [(intermediate, hidden)], (hidden, intermediate)]


def targeted_layers(model):
    """All linear layers but the output head, with the adapter on them, if there is one."""
    tuned = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    head = model.get_output_embeddings()
    return tuned or [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]


def kinds_of_layers(model):
    """The last part of the name of each of `targeted_layers`, such as "q_proj"."""
    names = {module: name for name, module in model.named_modules()}
    return [names[layer].rpartition(".")[2] for layer in targeted_layers(model)]


def build_llama(method, sizes, vocab_size, seq_length, rest, device, dtype, seed):
    """A Llama as the method trains it, and its optimizer.

    Args:
        rest: whether everything outside the linear layers (embeddings, norms, head) trains too, whatever the method.
    """
    torch.manual_seed(seed)
    model = llama(sizes, vocab_size, seq_length).to(device, dtype)
    targeted = [layer.weight for layer in targeted_layers(model)]
    if is_poet(method):
        settings = {"train_rest": rest, "seed": seed}
        if not folds_every_step(method):
            settings["merge_interval"] = MERGE_INTERVAL
        model = _wrap(model, adapter_config(method, "all-linear", POETConfig.for_pretraining, **settings))
        groups = poet_param_groups(model, lr=_LR, poet_lr=_LR)
        return model, RotationMuon(groups) if folds_every_step(method) else adamw(groups)
    outside = [parameter for parameter in model.parameters() if all(parameter is not weight for weight in targeted)]
    config = adapter_config(method, "all-linear")
    if config is not None:
        model = _wrap(model, config)
    for weight in targeted:
        weight.requires_grad_(method == "full")
    for parameter in outside:
        parameter.requires_grad_(rest)
    return model, adamw(trainable(model))


def _wrap(model, config):
    with warnings.catch_warnings():
        # PEFT takes another block size where the one asked for does not divide; the results say which.
        warnings.filterwarnings("ignore", message="Invalid `oft_block_size`")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        return get_peft_model(model, config)


class LlamaContender:
    """One method's model and optimizer."""

    def __init__(self, method, sizes, rest, args):
        self.method = method
        self.clock = Clock(args.device)
        self.shapes = linear_shapes(sizes)
        self.dtype = getattr(torch, args.dtype)
        self.model, self.optimizer = build_llama(
            method,
            sizes,
            args.vocab_size,
            args.seq_length,
            rest,
            args.device,
            self.dtype,
            args.seed,
        )
        generator = torch.Generator().manual_seed(args.seed)
        size = args.batch_size, args.seq_length
        self.input_ids = torch.randint(args.vocab_size, size, generator=generator).to(args.device)

    def loss(self):
        with autocast(self.input_ids.device, self.dtype):
            return self.model(input_ids=self.input_ids, labels=self.input_ids).loss

    def finish_step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()

    def run(self, num_micro_batches):
        times = [self.clock.time(lambda: self.loss().backward()) for _ in range(num_micro_batches)]
        optimizer = self.clock.time(self.finish_step)
        phases = {"first": times[0], "optimizer": optimizer, "step": sum(times) + optimizer}
        if num_micro_batches > 1:
            phases["later"] = sum(times[1:]) / (num_micro_batches - 1)
        return phases

    def memory(self):
        device = self.input_ids.device
        return measure_memory(
            self.model, self.optimizer, self.loss, lambda loss: loss.backward(), [self.input_ids], device
        ).as_dict()

    def describe(self):
        """Numbers of parameters, and what the targeted layers hold beside what the papers' formulas predict."""
        layers = targeted_layers(self.model)
        tensors = [tensor for layer in layers for tensor in module_tensors(layer)]
        trained = [parameter for layer in layers for parameter in trainable(layer)]
        moments = [t for p in trained for t in self.optimizer.state[p].values() if t.dim()]
        item = self.input_ids.new_empty(0, dtype=next(self.model.parameters()).dtype).element_size()
        return {
            "trained": sum(p.numel() for p in trainable(self.model)),
            "trained_in_linear_layers": sum(p.numel() for p in trained),
            "oft_block_sizes": sorted({b for layer in layers for b in getattr(layer, "oft_block_size", {}).values()}),
            "linear_layers_held": storage_bytes(tensors) + storage_bytes(moments),
            "linear_layers_formula": formula(self.method, self.shapes, item),
        }

    def folds(self, num_folds):
        """Seconds of folds after a step."""
        self.loss().backward()
        self.finish_step()
        return quartiles(
            self.clock.time(lambda: merge_and_reinitialize(self.model, self.optimizer)) for _ in range(num_folds)
        )


def formula(method, shapes, item):
    """Bytes of weights and moments in the linear layers according to the papers; None where they have no formula."""
    if method == "full":
        return item * sum(adamw_held(m, n) for m, n in shapes)
    if not is_poet(method):
        return None
    if folds_every_step(method):
        b = int(method.rpartition("-")[2])
        return item * sum(m * n + 2 * poet_parameters(m, n, b) for m, n in shapes)
    _, size, *rest = method.split("-")
    if size == "fs":
        above, below = map(int, rest[0].split("/"))
        return item * sum(adapter_held(m, n, fully_stochastic_parameters(m, n, above / below)) for m, n in shapes)
    return item * sum(adapter_held(m, n, poet_parameters(m, n, int(size))) for m, n in shapes)
