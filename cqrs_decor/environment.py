"""Settings from the environment. Apart from settings.py, since pydantic-settings is slow to import."""

from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from cqrs_decor.settings import PREFIX, Settings


class _Environment(Settings, BaseSettings):
    """The same settings, completed from the environment; no file is read."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        frozen=True,
        extra="ignore",
        enable_decoding=False,
        validate_default=False,  # as for other models: a default that depends on another setting is not held to it
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings, env_settings)


def completed(given: Settings | None) -> Settings:
    """What was given, and the environment for the rest; `model_fields_set` of the result names both, defaults not.

    Raises:
        SettingError: A variable does not fit.
    """
    return _Environment(**(given.model_dump(exclude_unset=True) if given is not None else {}))
