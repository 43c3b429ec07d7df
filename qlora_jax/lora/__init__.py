"""LoRA as data and pure functions; nothing here knows a model class.

config -> targets (what a configuration selects) -> functional (the update) -> init;
combine and multi work on several adapters.
"""
