"""Settings: flags over environment over file. The one reader of the environment and of the settings file."""

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, Self

import structlog
from platformdirs import user_data_path
from pydantic import Field, SecretStr, ValidationInfo, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from cdam_server.settings.specs import FOLDER, ModelSpec, load_models_file

MIB = 1024 * 1024
_ONE_MODEL = {
    "model",
    "model_name",
    "pretrained",
    "checkpoint",
    "random_weights",
    "head",
    "outputs",
    "task",
    "num_outputs",
    "input_size",
    "resample",
    "weights_key",
}
_PREFIX: Final = "CDAM_"
_MOST_DEVICES: Final = 16  # more than any machine has
_log = structlog.get_logger("cdam.server")
# Read elsewhere: by the command line and by the client's commands.
_OTHER_VARIABLES: Final = {"CDAM_CONFIG", "CDAM_SERVER", "CDAM_TOKEN"}
# What Kubernetes sets in every container of a namespace with a service called cdam..., and Docker for a link of such a
# name: not meant as settings.
_LINK_MARK: Final = re.compile(r"(?P<service>\w+)(_SERVICE_HOST=.*|_PORT=(tcp|udp|sctp)://.*)")
_SERVICE_LINK: Final = re.compile(
    r"_SERVICE_(HOST|PORT(_\w+)?)|_PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR|START|END))?)?|_NAME|_ENV_\w+"
)


class Settings(BaseSettings):
    """Everything that can be set, by flag ``--max-batch-size``, environment ``CDAM_MAX_BATCH_SIZE`` or YAML file.

    An empty variable counts as none: that is what a template makes of a value that was not given.
    """

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX, env_ignore_empty=True, extra="forbid", frozen=True, protected_namespaces=()
    )

    # Which file the class being built reads; set by `load` alone.
    _file: ClassVar[Path | None] = None

    # Without TLS and authentication only this machine is served, unless told otherwise.
    address: str = "127.0.0.1:8001"
    admin_address: str = "127.0.0.1:8002"
    models_file: Path | None = None
    model: str = "demo"
    model_name: str = ""
    pretrained: bool = False
    checkpoint: Path | None = None
    weights_key: str | None = None
    random_weights: bool = False
    head: Path | None = None
    outputs: Path | None = None
    task: Literal["multi_class", "multi_label", "binary", "regression"] | None = None
    num_outputs: int | None = Field(default=None, ge=0)
    input_size: Annotated[tuple[int, int] | None, NoDecode] = None
    resample: bool = False
    data_dir: Path = Field(default_factory=lambda: user_data_path("cdam-serve", appauthor=False))
    store: SecretStr = SecretStr("")
    device: str = "auto"
    front_ends: int | None = Field(default=None, ge=0, le=64)
    threads: int = Field(default=0, ge=0)
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    compile: bool = False
    token_cache_mib: int = Field(default=256, ge=0)
    max_batch_size: int = Field(default=16, ge=1)
    max_queue_delay_microseconds: int = Field(default=0, ge=0)
    max_pending: int = Field(default=256, ge=1)
    max_pending_passes: int = Field(default=4096, ge=1)
    max_pending_mib: int = Field(default=256, ge=1)
    deadline_margin: float = Field(default=1.5, ge=1, le=10)
    compute_slots: int = Field(default=0, ge=0, le=16)
    decode_threads: int = Field(default=4, ge=1, le=64)
    max_stream_items: int = Field(default=32, ge=1)
    max_connection_age_seconds: float = Field(default=300.0, ge=1)
    max_message_bytes: int = Field(default=64 * MIB, ge=1024)
    max_image_bytes: int = Field(default=32 * MIB, ge=1)
    max_image_pixels: int = Field(default=50_000_000, ge=1)
    max_patches: int = Field(default=2500, ge=1)
    max_targets: int = Field(default=100, ge=1)
    max_samples: int = Field(default=500, ge=1)
    max_concept_images: int = Field(default=1000, ge=1)
    max_passes: int = Field(default=1000, ge=1)
    max_evaluation_passes: int = Field(default=20_000, ge=1)
    drain_wait_seconds: float = Field(default=0.0, ge=0)
    drain_seconds: float = Field(default=30.0, ge=0)
    watchdog_seconds: float = Field(default=120.0, ge=1)
    tracing_endpoint: str = ""
    log_format: Literal["auto", "console", "json"] = "auto"
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("address", "admin_address")
    @classmethod
    def _host_and_port(cls, address: str, info: ValidationInfo) -> str:
        host, _, port = address.rpartition(":")
        if info.field_name == "address" and address.startswith("unix:"):
            return address
        if not (host and port.isdecimal() and int(port) < 65536):
            raise ValueError(f"must be HOST:PORT, not {address!r}")
        return address

    @field_validator("input_size", mode="before")
    @classmethod
    def _one_or_two_numbers(cls, size: object) -> object:
        if not isinstance(size, str | int):
            return size
        numbers = str(size).lower().split("x")
        if not (len(numbers) in {1, 2} and all(number.strip().isdecimal() for number in numbers)):
            raise ValueError(f"must be 224 or 224x336 (height x width), not {size!r}")
        return int(numbers[0]), int(numbers[-1])

    @field_validator("store")
    @classmethod
    def _known_store(cls, store: SecretStr) -> SecretStr:
        if store and not store.get_secret_value().startswith(("postgresql://", "postgres://")):
            raise ValueError("must be postgresql://USER@HOST/DATABASE; without it, concepts are kept in data_dir")
        return store

    @model_validator(mode="after")
    def _two_ports(self) -> Self:
        port = self.address.rpartition(":")[2]
        if port != "0" and port == self.admin_address.rpartition(":")[2]:
            raise ValueError(f"address and admin_address must not share port {port}")
        return self

    @model_validator(mode="after")
    def _one_source_of_models(self) -> Self:
        given = self.model_fields_set & _ONE_MODEL
        if self.models_file is not None and given:
            raise ValueError(f"models_file lists the models: set {', '.join(sorted(given))} there, for each model")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then environment, then file."""
        file = YamlConfigSettingsSource(settings_cls, yaml_file=cls._file)
        return init_settings, env_settings, file

    @model_validator(mode="after")
    def _processes_that_can_be(self) -> Self:
        if self.address.startswith("unix:") and (self.front_ends or 0) > 1:
            raise ValueError("address is a path, which one front end serves alone: front_ends must be 0 or 1")
        if len(self.devices) > _MOST_DEVICES:
            raise ValueError(f"device names {len(self.devices)} devices; at most {_MOST_DEVICES} are allowed")
        if self.front_ends == 0 and len(self.devices) > 1:
            raise ValueError("device names several: each has a process of its own, so front_ends must not be 0")
        return self

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices, each with a process of its own."""
        return tuple(name.strip() for name in self.device.split(","))

    def __reduce__(self) -> tuple[Any, ...]:
        """For other processes: `load` makes a class of its own, which they don't have."""
        return _restored, (self.__dict__, self.model_fields_set)

    @classmethod
    def load(cls, file: Path | None = None, **flags: Any) -> "Settings":
        """Settings from flags that were given, the environment and a YAML file.

        Raises:
            pydantic.ValidationError: A setting is unknown or its value is wrong.
            OSError: The file can't be read.
        """
        if file is not None and not file.is_file():
            raise FileNotFoundError(f"there is no settings file {file}")
        reader = type("Settings", (cls,), {"_file": file})
        loaded = reader(**{name: value for name, value in flags.items() if value is not None})
        assert isinstance(loaded, Settings)
        return loaded

    def specs(self) -> list[ModelSpec]:
        """The models to serve, the default one first.

        Raises:
            LoadError: The models file is wrong.
        """
        if self.models_file is not None:
            return load_models_file(self.models_file)
        given = {
            "pretrained": self.pretrained or None,
            "checkpoint": self.checkpoint,
            "random_weights": self.random_weights or None,
            "head": self.head,
            "outputs": self.outputs,
            "task": self.task,
            "num_outputs": self.num_outputs,
            "input_size": self.input_size,
            "resample": self.resample or None,
            "weights_key": self.weights_key,
        }
        chosen = {name: value for name, value in given.items() if value is not None}
        name = self.model_name or (
            Path(self.model.removeprefix(FOLDER)).name if self.model.startswith(FOLDER) else self.model
        )
        return [ModelSpec.model_validate({"name": name, "architecture": self.model, **chosen})]


def _restored(values: dict[str, Any], given: set[str]) -> Settings:
    return Settings.model_construct(given, **values)


def unknown_variables() -> dict[str, str]:
    """Environment variables that look like settings and are none, each with what may have been meant, or "".

    A variable that is misspelled is not read at all: nothing but this would tell its author.
    """
    known = {_PREFIX + field.upper() for field in Settings.model_fields} | _OTHER_VARIABLES
    ours = sorted(name.upper() for name in os.environ if name.upper().startswith(_PREFIX))
    words = [name.removeprefix(_PREFIX) for name in known]
    marks = (_LINK_MARK.fullmatch(f"{name.upper()}={value}") for name, value in os.environ.items())
    services = {mark["service"] for mark in marks if mark is not None}
    return {
        name: next((_PREFIX + match for match in difflib.get_close_matches(name.removeprefix(_PREFIX), words, n=1)), "")
        for name in ours
        if name not in known
        and not any(
            name.startswith(service) and _SERVICE_LINK.fullmatch(name.removeprefix(service)) for service in services
        )
    }


def warn_of_unknown_variables() -> None:
    """Log the names of environment variables that were not read, with those that may have been meant."""
    unknown = unknown_variables()
    for name, similar in unknown.items():
        if similar:
            _log.warning("unknown environment variable", name=name, similar=similar)
    if others := [
        name for name, similar in unknown.items() if not similar
    ]:  # in one line: another program's, it may be
        _log.warning("unknown environment variables", names=others)
