"""Using a model: generation, chat, comparison.

model (`Model`) -> text (prompts, chat, streams) -> decode (the loop over tokens) ->
sampling (config: its settings); identity and compare answer whether an adapter belongs
to its base.
"""
