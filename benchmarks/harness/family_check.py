"""One family of transformers under POET: built tiny, wrapped, trained for a step, saved, reloaded, merged.

`check` gives what came of it as plain values, in the fields that the report reads:

- "status": "works", "refused", "not built", "no inputs" (none that is known here), or "fails";
- "message": why, where it does not work;
- "rotated": how many layers are rotated, "experts": how many stacked parameters;
- "left_out": names of the layers that are not, by the reason that the library gave, and "silent", by none;
- "unused": names of rotated layers whose weight the model itself gives no gradient with these inputs;
- "errors": by check, the largest relative difference of an output.
"""

import copy
import re
import tempfile
import warnings

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from poet_peft import POETConfig
from poet_peft.layer import poet_layers

from .family_build import NoInputsError, build, short
from .left_out import REASONS
from .model_outputs import NoGradientError, backward, difference, has_gradient, in_double, values


BLOCK_SIZE = 8
LEARNING_RATE = 1e-2
TOLERANCE = 1e-4  # of what is computed in another order, in fp32
ROUNDING = 2e-6  # of the same operations: products depend on where in memory a tensor begins
SAME_OPERATIONS = ("start", "reload")


def check(family, overrides=None):
    """Everything above, for a `Family`."""
    try:
        model, inputs, what = build(family, overrides or {})
    except NoInputsError as error:
        return {"status": "no inputs", "message": str(error)}
    except Exception as error:
        return {"status": "not built", "message": short(error)}
    result = {"parameters": sum(p.numel() for p in model.parameters()), "inputs": what}
    try:
        found = check_model(model, inputs, family.task_type)
        if found["status"] == "fails" and not is_within(found.get("errors", {})):
            again = check_model(model.double(), in_double(inputs), family.task_type)
            found = again | {"in double precision": True} if again["status"] == "works" else found
        return result | found
    except Exception as error:
        where = error.__traceback__
        while where.tb_next is not None:
            where = where.tb_next
        place = f"{where.tb_frame.f_globals.get('__name__')}:{where.tb_lineno}"
        return result | {"status": "fails", "message": f"{short(error)} ({place})"}


def check_model(model, inputs, task_type=None):
    base = copy.deepcopy(model)
    expected = values(model, inputs)
    if difference(values(model, inputs), expected):
        return {"status": "no inputs", "message": "its outputs change from call to call, with the same seed"}
    trains = weights_that_train(base, inputs)
    config = POETConfig(target_modules="all-linear", block_size=BLOCK_SIZE, task_type=task_type)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            wrapped = get_peft_model(model, config)
        except (ValueError, TypeError, NotImplementedError) as error:
            return {"status": "refused", "message": short(error)}
    said = [str(warning.message) for warning in caught]
    layers = {layer.module_name: layer for _, layer in poet_layers(wrapped.base_model.model)}
    result = {"rotated": len(layers), "left_out": left_out(base, layers, said)}
    errors = result["errors"] = {"start": difference(values(wrapped, inputs), expected)}

    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=LEARNING_RATE)
    try:
        backward(wrapped, inputs)
    except NoGradientError:  # layers inside a function of autograd whose inputs come from frozen embeddings
        wrapped.enable_input_require_grads()
        backward(wrapped, inputs)
        result["input gradients"] = True
    without = {name for name, layer in layers.items() if not all(map(has_gradient, rotations_of(layer)))}
    result["unused"] = names(without - trains)
    result["no gradient"] = names(without & trains)
    optimizer.step()
    trained = values(wrapped, inputs)
    result["moved"] = difference(trained, expected)

    with tempfile.TemporaryDirectory() as folder:
        try:
            wrapped.save_pretrained(f"{folder}/adapter")
        except NotImplementedError as error:  # PEFT asks for the embeddings of a model that gives none
            return result | {"status": "refused", "message": short(error)}
        fresh = PeftModel.from_pretrained(copy.deepcopy(base), f"{folder}/adapter").eval()
        errors["reload"] = difference(values(fresh, inputs), trained)
        del fresh
        plain = wrapped.merge_and_unload()
        merged = values(plain, inputs)
        errors["merge"] = difference(merged, trained)
        plain.save_pretrained(f"{folder}/plain")
        errors["plain"] = difference(reloaded(plain, f"{folder}/plain", inputs), merged)
        if not is_within(errors):
            result["steps over"] = difference(values(jittered(base), inputs), expected)
        if not errors["plain"] <= TOLERANCE:
            base.save_pretrained(f"{folder}/base")
            result["unchanged model"] = difference(reloaded(base, f"{folder}/base", inputs), expected)
    result["status"], result["message"] = verdict(result)
    return result


def is_within(errors):
    return all(error <= (ROUNDING if name in SAME_OPERATIONS else TOLERANCE) for name, error in errors.items())


def jittered(model):
    """The model with weights changed by as much as rounding does."""
    generator = torch.Generator().manual_seed(3)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.mul_(1 + 1e-7 * torch.randn(parameter.shape, generator=generator))
    return model


def verdict(result):
    """The status of a model that was not refused, and what is wrong with it."""
    wrong = []
    for name, error in result["errors"].items():
        if name == "plain" and not result.get("unchanged model", 0) <= TOLERANCE:
            continue  # transformers itself does not bring back what it saved
        if error <= 2 * result.get("steps over", 0):
            continue  # choices among nearly equal scores, as of proposals, turn out otherwise
        if not error <= (ROUNDING if name in SAME_OPERATIONS else TOLERANCE):
            wrong.append(f"{name}: {error:.1e}")
    if result["no gradient"]:
        wrong.append(f"no gradient: {', '.join(result['no gradient'])}")
    if result["left_out"].get("silent"):
        wrong.append(f"left out silently: {', '.join(result['left_out']['silent'])}")
    if not result["rotated"]:
        return "refused", "it has no linear layer"
    if not result["moved"] > 0:
        wrong.append("a step changed no output")
    return ("fails", "; ".join(wrong)) if wrong else ("works", "")


def left_out(model, rotated, said):
    """Names of linear layers that are not rotated, and of experts, by what the library said of them."""
    found = {key: [m for m in said if reason.sign in m] for key, reason in REASONS.items() if reason.sign}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    result = {}
    for name, module in model.named_modules():
        is_attention = isinstance(module, nn.MultiheadAttention)
        if not (is_attention or isinstance(module, nn.Linear | Conv1D)):
            continue
        if (f"{name}.in_proj_weight" if is_attention else name) in rotated:
            continue
        pattern = names([name])[0]
        reason = next((r for r, messages in found.items() if any(is_named(n, m) for m in messages for n in
                                                                 (name, pattern))), None)  # fmt: skip
        if reason is None and module is head:
            reason = "head"
        result.setdefault(reason or "silent", []).append(name)
    bare = {
        f"{name}.{parameter_name}"
        for name, module in model.named_modules()
        if not isinstance(module, nn.Linear | Conv1D)
        for parameter_name, _ in module.named_parameters(recurse=False)
    }
    named = [n for n in names(bare) if any("leaves out" in m and is_named(n, m) for m in said)]
    if named:
        result["experts"] = named
    return {reason: names(found) for reason, found in result.items()}


def is_named(name, message):
    return re.search(rf"(?<![\w.]){re.escape(name)}(?![\w*]|\.[\w*])", message) is not None


def names(found):
    """With `*` for the index of a layer, each once."""
    return list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in sorted(found)))


def weights_that_train(model, inputs):
    """Names of the layers and parameters that get a gradient where the model itself trains in full."""
    model = copy.deepcopy(model).requires_grad_(True)
    backward(model, inputs)
    trained = {name for name, parameter in model.named_parameters(remove_duplicate=False) if has_gradient(parameter)}
    return trained | {name.removesuffix(".weight") for name in trained}


def rotations_of(layer):
    return [p for name, p in layer.named_parameters() if ("poet_R" in name or "poet_P" in name) and p.numel()]


def reloaded(model, folder, inputs):
    """Outputs of the model that transformers alone loads from the folder."""
    return values(type(model).from_pretrained(folder).eval(), inputs)
