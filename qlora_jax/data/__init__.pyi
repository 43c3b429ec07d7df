# What the other packages use of `qlora_jax.data`.

from .arrays import Examples as Examples
from .batches import Batches as Batches
from .batches import eval_batches as eval_batches
from .batches import prefetch as prefetch
from .chat import ChatRenderer as ChatRenderer
from .config import LOCATION_FIELDS as LOCATION_FIELDS
from .config import SOURCE_FIELDS as SOURCE_FIELDS
from .config import DataConfig as DataConfig
from .config import Format as Format
from .config import Source as Source
from .config import TooLong as TooLong
from .config import TrainOn as TrainOn
from .config import name_of as name_of
from .conversations import to_messages as to_messages
from .encoding import IGNORE as IGNORE
from .encoding import Segmented as Segmented
from .encoding import tokenize as tokenize
from .examples import data_size as data_size
from .examples import load_examples as load_examples
from .held_out import content_keys as content_keys
from .held_out import hold_out as hold_out
from .mixture import Mixture as Mixture
from .mixture import lay_out as lay_out
from .notes import data_notes as data_notes
from .packing import packs as packs
