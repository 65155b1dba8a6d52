"""The settings of every command: frozen dataclasses, importable without torch or numpy.

A docstring below a field is its help (`latentflow.cli`). Checks against tables of other packages import them where they
run, and run only for values that differ from the defaults.
"""

from __future__ import annotations

from .control import CONTROLS as CONTROLS
from .control import Control as Control
from .control import ControlConfig as ControlConfig
from .control import control_kinds as control_kinds
from .inference import AdapterChoice as AdapterChoice
from .inference import MemoryConfig as MemoryConfig
from .inference import SamplingConfig as SamplingConfig
from .inference import TokenSamplingConfig as TokenSamplingConfig
from .joint import JointConfig as JointConfig
from .latent_variable import LatentVariableConfig as LatentVariableConfig
from .loop import LoopConfig as LoopConfig
from .model import AlignmentConfig as AlignmentConfig
from .model import AutoencoderConfig as AutoencoderConfig
from .model import FlowConfig as FlowConfig
from .model import NetworkConfig as NetworkConfig
from .model import RoutingConfig as RoutingConfig
from .model import TextConfig as TextConfig
from .run import PRESETS as PRESETS
from .run import AdapterConfig as AdapterConfig
from .run import DataConfig as DataConfig
from .run import DistillationConfig as DistillationConfig
from .run import FineTuningConfig as FineTuningConfig
from .run import FramingConfig as FramingConfig
from .run import RunConfig as RunConfig
from .tokens import TokenConfig as TokenConfig
