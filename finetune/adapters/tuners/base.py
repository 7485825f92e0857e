"""What the project's own tuners share: how peft learns of them, and how it wraps a layer with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.peft_types import PeftType
from torch import nn


def add_type(name: str) -> PeftType:
    """A new member of peft's enum: `register_peft_method` accepts no other names (peft 0.21)."""
    value = name.upper()
    if value in PeftType.__members__:
        return PeftType[value]
    member = str.__new__(PeftType, value)
    member._name_, member._value_ = value, value
    PeftType._member_map_[value] = member
    PeftType._value2member_map_[value] = member
    PeftType._member_names_.append(value)
    type.__setattr__(PeftType, value, member)
    return member


@dataclass
class TunerConfig(PeftConfig):
    kind: ClassVar[PeftType]
    target_modules: list[str] | str | None = field(default=None)
    """The modules that are wrapped; those that the tuner chooses when unset."""
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.kind
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # peft compares and saves sets


class WrappedLayer(nn.Module, BaseTunerLayer):
    """A module of the base with something of ours on it; `containers` are dicts from adapter name to that."""

    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **containers: Any) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        for name, container in containers.items():
            setattr(self, name, container)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: Any) -> None:
        raise NotImplementedError

    if TYPE_CHECKING:  # peft is untyped, and torch's own __getattr__ says Tensor | Module

        def __getattr__(self, name: str) -> Any: ...


class Tuner(BaseTuner):
    """Wraps the modules that `choose` names, unless the config says which."""

    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (peft's interface)

    def choose(self, model: Any, config: Any) -> list[str]:
        """Full names of the modules to wrap."""
        raise NotImplementedError

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        if config.target_modules is None:
            config.target_modules = set(self.choose(model, config))

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config

    def _create_and_replace(
        self, config: Any, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module, current_key: str,
        **_: Any,
    ) -> None:  # fmt: skip
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, config)
            return
        layer = self.tuner_layer_cls(target, adapter_name, config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)
