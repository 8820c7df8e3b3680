"""`python -m poet_peft.integrations.lm_eval ...` is lm-eval's `lm_eval ...`, which then can load POET adapters.

    python -m poet_peft.integrations.lm_eval run --model hf --model_args pretrained=BASE,peft=ADAPTER --tasks TASK

lm-eval loads an adapter through PEFT, which has to know the name POET first. That takes one import, and this is it.
"""

from __future__ import annotations


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
