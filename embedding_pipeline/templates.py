"""`{{ … }}` in a table's YAML: what it may name, and how it is resolved."""

import os
import re
from typing import Any

from embedding_pipeline.errors import SpecError
from embedding_pipeline.settings import load_settings
from embedding_pipeline.yaml_documents import Document, Location, dotted


def template_scope() -> dict[str, Any]:
    """What `{{ … }}` may name; Dagster's own resolution of a component's YAML is given it too.

    `env`: environment variables. `embedding_api.provider` and `embedding_api.model`: the model of
    the shipped tables' 1536-dim columns, which `USE_EMBEDDING_API=true` alone decides (a key that
    merely happens to be set spends nothing).
    """
    if load_settings().use_embedding_api:
        api = {"provider": "openai", "model": "text-embedding-3-small"}
    else:
        api = {"provider": "local", "model": "all-minilm-l6-v2-layers"}
    return {"env": Environment(), "embedding_api": api}


class Environment:
    """`{{ env.NAME }}` and `{{ env("NAME", "default") }}`, as Dagster writes them.

    Only variables that are named are ever read. A blank one counts as unset, as in the settings;
    an unset one without a default is an error that names it.
    """

    # jinja2's sandbox asks these of what it calls
    unsafe_callable = False
    alters_data = False

    def __call__(self, name: str, default: Any = ...) -> Any:
        value = os.environ.get(name, "")
        if value.strip():
            return value
        return _missing(name) if default is ... else default

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("jinja", "_")):  # jinja2 asks whether this is one of its own objects
            raise AttributeError(name)
        return self(name)


def _missing(name: str) -> Any:
    from jinja2 import StrictUndefined

    return StrictUndefined(f"the environment variable {name} is not set", name=name)


def resolve(document: Document) -> Any:
    """A document's value with every `{{ … }}` replaced by text.

    SpecError with file, line and key for one that cannot be resolved. Values never appear in it:
    the environment holds secrets.
    """
    return _resolve(document.value, (), document)


def _resolve(value: Any, location: Location, document: Document) -> Any:
    if isinstance(value, dict):
        return {key: _resolve(item, (*location, str(key)), document) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve(item, (*location, i), document) for i, item in enumerate(value)]
    if not (isinstance(value, str) and "{{" in value):
        return value
    from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError
    from jinja2.sandbox import SandboxedEnvironment

    environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    try:
        return environment.from_string(value).render(template_scope())
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
        if isinstance(error, TemplateSyntaxError):
            remedy = "for braces that are no template, write {{ '{{' }}"
        elif re.search(r"\benv\b", value):
            remedy = "set it, or write the value itself"
        else:
            remedy = "there are env.NAME, embedding_api.provider and embedding_api.model"
        raise SpecError(
            f"{document.where(location)}: {dotted(location)}: {value!r} cannot be resolved: "
            f"{error}; {remedy}"
        ) from None
