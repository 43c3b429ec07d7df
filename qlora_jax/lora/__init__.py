"""Low-rank adapters.

config       LoraConfig: settings in the words of PEFT
patterns     regular expressions from files, matched within a time limit
targets      select: what a configuration trains in a model
functional   the forward pass: A, B, DoRA, token rows; `bind`
init         initial values (PiSSA, OLoRA, LoftQ, ...); adapters trained further
combine      the weighted sum of adapters as one adapter
multi        several adapters in one batch, one for each row
"""
