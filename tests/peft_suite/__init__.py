"""PEFT's own tests, run on POET: `tests/run_peft_suite.py` is the command.

twins.py    what a row of PEFT's test tables about OFT becomes for POET
plugin.py   the pytest plugin that replaces those rows while PEFT's files are collected, and records outcomes
models.py   tiny models under the names that the tests load from the Hub
sources.py  PEFT's test files, from its source distribution
meant.py    which failures are meant, and why
report.py   the summary of a run, as JSON and Markdown
"""
