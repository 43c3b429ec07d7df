# What the other packages use of `qlora_jax.planning`.

from .compile import find_compiler as find_compiler
from .compile import how_to_get_the_compiler as how_to_get_the_compiler
from .estimate import estimate_warnings as estimate_warnings
from .estimate import model_flops_per_token as model_flops_per_token
from .estimate import parameter_report as parameter_report
from .gpus import ALLOWANCE as ALLOWANCE
from .gpus import PINNED_VARIABLE as PINNED_VARIABLE
from .gpus import UNLIMITED as UNLIMITED
from .gpus import GpuSpec as GpuSpec
from .gpus import find_gpu as find_gpu
from .gpus import give_back_freed_memory as give_back_freed_memory
from .gpus import gpu_named as gpu_named
from .gpus import more_memory_advice as more_memory_advice
from .gpus import pinned_limit as pinned_limit
from .gpus import this_device as this_device
from .ladder import Policy as Policy
from .ladder import policies as policies
from .mesh import MeshChoice as MeshChoice
from .mesh import choose_mesh as choose_mesh
from .mesh import gpus_per_node as gpus_per_node
from .plan import Plan as Plan
from .plan import Planner as Planner
from .plan import Quantity as Quantity
from .plan import device_bytes as device_bytes
from .step import Step as Step
from .step import StepMemory as StepMemory
