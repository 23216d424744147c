"""What all dashboards have in common: variables, selectors, and panels with everything a reader needs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from grafana_foundation_sdk.builders import common, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import heatmap as heatmap_models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from app.telemetry.metrics import ATTEMPTS, ORDERS_STARTED
from dashboards.src.names import counter

#: The one place that says where numbers come from; every panel and variable refers to it.
DATASOURCE: Final = common_models.DataSourceRef(type_val="prometheus", uid="${datasource}")

#: Selects the product's own processes, in every query about them.
OURS: Final = 'job=~"$job",namespace=~"$namespace",app_kubernetes_io_instance=~"$release",instance=~"$instance"'
#: Selects what is recorded of them, and other targets of the release.
RELEASE: Final = 'namespace=~"$namespace",app_kubernetes_io_instance=~"$release"'
#: Selects by the namespace alone: for what others count, such as spans and alerts.
THEIRS: Final = 'namespace=~"$namespace"'
#: Selects the Temporal server. It has no label `temporal`: the chart finds the selector by it, and replaces it.
SERVER: Final = f'{RELEASE},temporal=""'
QUEUE: Final = 'task_queue=~"$queue"'
#: The server's label has `_` where the queue's name has `-`, so `$queue` cannot select; its own queues are left out.
SERVER_QUEUES: Final = 'taskqueue!~"temporal_sys.*|default_worker_tq"'

PanelBuilder = TypeVar("PanelBuilder", timeseries.Panel, stat.Panel, heatmap.Panel)


@dataclass(frozen=True)
class Query:
    """A query and how its series are called."""

    expr: str
    legend: str = "__auto"
    exemplar: bool = False


def select(metric: str, *matchers: str) -> str:
    """A metric of the product's processes."""
    return f"{metric}{{{','.join((OURS, *matchers))}}}"


def of_server(metric: str, *matchers: str) -> str:
    """A metric of the Temporal server."""
    return f"{metric}{{{','.join((SERVER, *matchers))}}}"


def of_spans(metric: str, *matchers: str) -> str:
    """A metric that the collector makes of spans."""
    return f"{metric}{{{','.join((THEIRS, *matchers))}}}"


def rate(selected: str, *by: str) -> str:
    """How often per second."""
    return f"sum{_by(by)} (rate({selected}[$__rate_interval]))"


def quantile(share: float, selected: str, *by: str) -> str:
    """A percentile of a histogram's buckets."""
    return f"histogram_quantile({share}, {rate(selected, *by, 'le')})"


def percentiles(selected: str, *by: str) -> list[Query]:
    """The median and what one in twenty, and one in a hundred, exceeds."""
    name = " ".join(f"{{{{{label}}}}}" for label in by)
    return [
        Query(quantile(share / 100, selected, *by), f"{name} p{share}".strip(), exemplar=True) for share in (50, 95, 99)
    ]


def ratio(part: str, whole: str) -> str:
    """A share, and nothing where there is no whole: NaN would be drawn as a gap that looks like an outage."""
    return f"{part} / ({whole} > 0)"


def _by(labels: Sequence[str]) -> str:
    return f" by ({', '.join(labels)})" if labels else ""


class Board:
    """A dashboard in the making."""

    def __init__(self, uid: str, title: str, description: str) -> None:
        self.uid = uid
        self._ids = itertools.count(1)
        self._builder = (
            builders.Dashboard(title)
            .uid(uid)
            .description(description)
            .tags(["trellis"])
            .readonly()
            .tooltip(models.DashboardCursorSync.CROSSHAIR)
            .time("now-1h", "now")
            .timezone("browser")
            .refresh("30s")
            .link(
                builders.DashboardLink("Trellis")
                .type(models.DashboardLinkType.DASHBOARDS)
                .tags(["trellis"])
                .include_vars(True)
                .keep_time(True)
            )
            .annotation(
                builders.AnnotationQuery()
                .name("Alerts")
                .datasource(DATASOURCE)
                .enable(True)
                .icon_color("red")
                .expr(f'ALERTS{{alertname=~"Trellis.*",alertstate="firing",{THEIRS}}}')
            )
        )
        for variable in _variables():
            self._builder.with_variable(variable)

    def choice(self, name: str, label: str, values: Sequence[str], chosen: str) -> None:
        """A variable with fixed values, one of which is chosen."""
        options = [models.VariableOption(selected=value == chosen, text=value, value=value) for value in values]
        self._builder.with_variable(
            builders.CustomVariable(name)
            .label(label)
            .values(",".join(values))
            .options(options)
            .current(models.VariableOption(selected=True, text=chosen, value=chosen))
        )

    def row(self, title: str) -> None:
        """Panels from here on stand under this heading."""
        self._builder.with_row(builders.Row(title).id(next(self._ids)))

    def series(
        self,
        title: str,
        description: str,
        unit: str,
        *queries: Query,
        stacked: bool = False,
        runbook: str = "",
        width: int = 12,
        limits: Sequence[tuple[float, str]] = (),
    ) -> None:
        """Numbers over time."""
        panel = (
            timeseries.Panel()
            .unit(unit)
            .min(0)
            .height(8)
            .span(width)
            .line_width(1)
            .fill_opacity(20 if stacked else 5)
            .show_points(common_models.VisibilityMode.NEVER)
            .legend(
                common.VizLegendOptions()
                .display_mode(common_models.LegendDisplayMode.TABLE)
                .placement(common_models.LegendPlacement.BOTTOM)
                .show_legend(True)
                .calcs(["mean", "lastNotNull"])
            )
            .tooltip(
                common.VizTooltipOptions()
                .mode(common_models.TooltipDisplayMode.MULTI)
                .sort(common_models.SortOrder.DESCENDING)
            )
        )
        if stacked:
            panel.stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL))
        if limits:
            panel.thresholds(_steps(limits)).thresholds_style(
                common.GraphThresholdsStyleConfig().mode(common_models.GraphThresholdsStyleMode.LINE)
            )
        self._add(panel, title, description, runbook, queries)

    def number(
        self,
        title: str,
        description: str,
        unit: str,
        query: Query,
        *,
        runbook: str = "",
        limits: Sequence[tuple[float, str]] = (),
    ) -> None:
        """One number, as it is now."""
        panel = (
            stat.Panel()
            .unit(unit)
            .height(4)
            .span(4)
            .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
            .graph_mode(common_models.BigValueGraphMode.AREA)
            .thresholds(_steps(limits))
            .color_scheme(builders.FieldColor().mode(models.FieldColorModeId.THRESHOLDS))
        )
        self._add(panel, title, description, runbook, [query])

    def heat(self, title: str, description: str, unit: str, selected: str) -> None:
        """How a histogram's observations are spread, over time."""
        panel = (
            heatmap.Panel()
            .unit(unit)
            .height(8)
            .span(12)
            .y_axis(heatmap.YAxisConfig().unit(unit))
            .color(
                heatmap.HeatmapColorOptions()
                .mode(heatmap_models.HeatmapColorMode.SCHEME)
                .scheme("Oranges")
                .fill("dark-orange")
                .steps(64)
                .exponent(0.5)
                .scale(heatmap_models.HeatmapColorScale.EXPONENTIAL)
            )
            .filter_values(heatmap.FilterValueRange().le(1e-9))
            .cell_gap(1)
        )
        query = Query(rate(selected, "le"), "{{le}}", exemplar=True)
        self._add(panel, title, description, "", [query], buckets=True)

    def build(self) -> models.Dashboard:
        """The finished dashboard."""
        return self._builder.build()

    def _add(
        self,
        panel: PanelBuilder,
        title: str,
        description: str,
        runbook: str,
        queries: Sequence[Query],
        *,
        buckets: bool = False,
    ) -> None:
        panel.id(next(self._ids)).title(title).description(description).datasource(DATASOURCE)
        for number, query in enumerate(queries):
            target = prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(chr(ord("A") + number))
            target.exemplar(query.exemplar).datasource(DATASOURCE)
            if buckets:
                target.format(PromQueryFormat.HEATMAP)
            panel.with_target(target.range())
        if runbook:
            url = f"${{runbooks}}/{runbook}.md"
            link = builders.DashboardLink(f"Runbook: {runbook}").type(models.DashboardLinkType.LINK).url(url)
            panel.links([link.target_blank(True)])
        self._builder.with_panel(panel)


def _steps(limits: Sequence[tuple[float, str]]) -> builders.ThresholdsConfig:
    steps = [
        models.Threshold(value=None, color="green"),
        *(models.Threshold(value, colour) for value, colour in limits),
    ]
    return builders.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)


def _variables() -> list[builders.DatasourceVariable | builders.QueryVariable | builders.TextBoxVariable]:
    started, attempts = counter(ORDERS_STARTED), counter(ATTEMPTS)
    return [
        builders.DatasourceVariable("datasource").label("Data source").type("prometheus"),
        # All of them, not `.+`: the Temporal server publishes the metrics of its own workers under the SDK's names.
        _values("job", "Job", f"label_values({started}, job)"),
        # Not every Prometheus adds one, hence `.*`.
        _values("namespace", "Namespace", f'label_values({started}{{job=~"$job"}}, namespace)', every=".*"),
        _values(
            "release",
            "Release",
            f'label_values({started}{{job=~"$job",namespace=~"$namespace"}}, app_kubernetes_io_instance)',
            every=".*",
        ),
        _values("instance", "Instance", f'label_values({started}{{job=~"$job",{RELEASE}}}, instance)', every=".+"),
        _values("queue", "Task queue", f'label_values({attempts}{{job=~"$job",{RELEASE}}}, task_queue)', every=".+"),
        builders.TextBoxVariable("runbooks")
        .label("Runbooks")
        .description("Where docs/runbooks of the repository can be read, for the links in the corners of panels.")
        .default_value("docs/runbooks"),
    ]


def _values(name: str, label: str, query: str, *, every: str | None = None) -> builders.QueryVariable:
    variable = (
        builders.QueryVariable(name)
        .label(label)
        .datasource(DATASOURCE)
        .query(query)
        .definition(query)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .current(models.VariableOption(selected=True, text="All", value="$__all"))
    )
    return variable.all_value(every) if every else variable
