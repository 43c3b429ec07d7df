"""Training as pure functions: settings, losses, optimizer and one step.

config -> loss -> objectives -> parameter_groups -> optimizer -> step
"""
