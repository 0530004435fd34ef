"""A request, checked: everything that a user may have got wrong, before any model is loaded or anything is written."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from segpipe.config import Config, fingerprint, row_settings
from segpipe.errors import OutputError, StoreError
from segpipe.layout import RunLayout
from segpipe.models import ModelRequest
from segpipe.models.weights import resolve_model
from segpipe.runs import check_output
from segpipe.shards import InputListing, list_input
from segpipe.storage import locate
from segpipe.tables import RunLabel


@dataclass(frozen=True, slots=True)
class Request:
    """A checked request: what is asked for, with every name resolved.

    Attributes:
        config: as given.
        listing: of the input.
        model: model, weights and selection.
        settings: what changes rows, in the form that the fingerprint is made of.
        label: what the run's files say about it.
        layout: where they lie.
    """

    config: Config
    listing: InputListing
    model: ModelRequest
    settings: Mapping[str, object]
    label: RunLabel
    layout: RunLayout


def check_request(config: Config, on_phase: Callable[[str], None] = lambda _: None) -> Request:
    """Look at the output, list the input, resolve model and weights, name the run.

    Args:
        config: as given.
        on_phase: told what takes a while: weights may have to be downloaded.

    Raises:
        RequestError: for every mistake of the user; one line with the fix.
        StoreError: if a store does not answer.
    """
    output = locate(config.output.uri, config.output.storage_options)
    if f"{output.uri}/".startswith(f"{locate(config.input.uri).uri}/"):
        raise OutputError(f"output.uri: {output.uri} lies inside the input; choose a folder beside it")
    try:
        check_output(output)
    except StoreError as error:
        raise OutputError(f"output.uri: cannot be used: {error}") from None
    listing = list_input(config.input)
    on_phase("looking for the weights")
    model = resolve_model(config.model, config.input.storage_options)
    settings = _settled(config, listing, model)
    digest = fingerprint(settings)
    run_id = f"{model.info.name.lower()}-{digest[:8]}" if config.output.run_id == "auto" else config.output.run_id
    label = RunLabel(run_id, digest, model.info)
    return Request(config, listing, model, settings, label, RunLayout(output, run_id))


def _settled(config: Config, listing: InputListing, model: ModelRequest) -> dict[str, object]:
    """Return what changes rows with every name resolved, so that two ways to say the same are the same run."""
    selection = model.selection
    return {
        **row_settings(config),
        "input.uri": locate(config.input.uri).uri,
        "input.format": listing.kind,
        "model.name": model.info.name,
        "model.category_names": {str(index): name for index, name in sorted(model.info.categories.items())},
        "model.weights": model.info.weights_sha256,
        "model.categories": sorted(selection.category_ids or ()),
        "model.category_thresholds": {str(key): value for key, value in sorted(selection.category_thresholds.items())},
    }
