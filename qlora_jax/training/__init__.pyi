# What the other packages use of `qlora_jax.training`.

from .config import Optimizer as Optimizer
from .config import ParameterGroup as ParameterGroup
from .config import TrainConfig as TrainConfig
from .optimizer import averaged as averaged
from .optimizer import make_optimizer as make_optimizer
from .parameter_groups import Group as Group
from .parameter_groups import note_idle as note_idle
from .parameter_groups import optimizer_groups as optimizer_groups
from .parameter_groups import schedule as schedule
from .step import TrainState as TrainState
from .step import init_state as init_state
from .step import jit_eval as jit_eval
from .step import jit_step as jit_step
