# What the other packages use of `qlora_jax.lora`.

from .combine import combine_adapters as combine_adapters
from .config import LoraConfig as LoraConfig
from .config import off_features as off_features
from .config import refused_features as refused_features
from .dropout import draw as draw
from .functional import abstract_adapters as abstract_adapters
from .functional import bind as bind
from .init import CHANGEABLE_SETTINGS as CHANGEABLE_SETTINGS
from .init import absorb as absorb
from .init import check_start as check_start
from .init import continued_config as continued_config
from .init import factor_out as factor_out
from .init import given_fields as given_fields
from .init import init_adapters as init_adapters
from .renaming import rename as rename
from .targets import AdaptedModule as AdaptedModule
from .targets import FullTensor as FullTensor
from .targets import Selection as Selection
from .targets import TokenRows as TokenRows
from .targets import linear_modules as linear_modules
from .targets import select as select
from .unmatched import absent_layers as absent_layers
from .unmatched import rows_of as rows_of
from .unused import unused_exclusions as unused_exclusions
from .unused import unused_patterns as unused_patterns
from .unused import unused_settings as unused_settings
