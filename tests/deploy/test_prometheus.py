"""Alerts and dashboard: they use Weft's metrics, promtool accepts them, and a real Prometheus answers from a scrape."""

import functools
import json
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Counter, Gauge, Histogram, start_http_server

from tests.deploy.files import DEPLOY, ROOT, document, expressions
from weft.config import ServerConfig
from weft.engine.request import FinishReason
from weft.errors import Code
from weft.metrics import Metrics

ALERTS = DEPLOY / "prometheus" / "alerts.yml"
DASHBOARD = DEPLOY / "grafana" / "weft.json"
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="needs Prometheus and promtool: apt-get install --no-install-recommends prometheus",
)


def dashboard() -> Any:
    return json.loads(DASHBOARD.read_text(encoding="utf-8"))


def all_expressions() -> list[str]:
    return [*expressions(document(ALERTS)), *expressions(dashboard())]


def exposed_names() -> set[str]:
    families = Metrics().registry.collect()
    return {family.name + suffix for family in families for suffix in SUFFIXES[family.type]}


def unknown_names(expression: str) -> set[str]:
    return set(re.findall(r"\bweft_\w+", expression)) - exposed_names()


@functools.cache
def server_source() -> str:
    paths = sorted((ROOT / "server" / "weft").rglob("*.py"))
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


def live(metrics: Metrics) -> None:
    """One more event of every kind, so that every series exists and every rate is above zero."""
    for metric in vars(metrics).values():
        if isinstance(metric, Counter | Gauge | Histogram):
            labels = metric._labelnames  # prometheus_client has no public names of labels
            child = metric.labels(*("any" for _ in labels)) if labels else metric
            child.observe(0.01) if isinstance(child, Histogram) else child.inc()


def test_every_metric_is_ours() -> None:
    assert len(all_expressions()) > 30
    for expression in all_expressions():
        assert not unknown_names(expression), expression


def test_a_metric_that_is_not_ours_would_be_seen() -> None:
    assert unknown_names("rate(weft_request_total[5m])") == {"weft_request_total"}
    assert unknown_names("weft_time_to_first_token_seconds") == {"weft_time_to_first_token_seconds"}


def test_every_label_is_ours() -> None:
    metrics = Metrics()
    live(metrics)
    labels: dict[str, set[str]] = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            labels.setdefault(sample.name, {"job", "instance"}).update(sample.labels)
    for expression in all_expressions():
        for name, matchers in re.findall(r"\b(weft_\w+)\{([^}]*)\}", expression):
            assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)) <= labels[name], expression
        for by, name in re.findall(r"sum by \(([^)]*)\) \(rate\((weft_\w+)", expression):
            assert {label.strip() for label in by.split(",")} <= labels[name], expression


@pytest.mark.parametrize(
    "attribute",
    [attribute for attribute, metric in vars(Metrics()).items() if isinstance(metric, Counter | Gauge | Histogram)],
)
def test_every_metric_is_set_somewhere(attribute: str) -> None:
    assert re.search(rf"metrics\.{attribute}\b", server_source())


def test_every_label_value_is_ours() -> None:
    known = {
        "finish_reason": {reason.value for reason in FinishReason},
        "code": {code.value for code in Code} | {"OK", "UNKNOWN"},
    }
    for expression in all_expressions():
        for label, values in re.findall(r'(\w+)(?:=~|!~|!=|=)"([^"$]*)"', expression):
            for value in values.split("|"):
                if label in known:
                    assert value in known[label], expression
                elif label != "job":
                    assert f'"{value}"' in server_source(), expression


def test_prometheus_scrapes_where_the_server_exposes() -> None:
    [job] = document(DEPLOY / "prometheus" / "prometheus.yml")["scrape_configs"]
    [target] = job["static_configs"][0]["targets"]
    host, port = target.split(":")
    assert host in document(DEPLOY / "compose.yaml")["services"]
    assert int(port) == ServerConfig().metrics_port


def test_the_dashboard_fits_its_grid() -> None:
    cells: set[tuple[int, int]] = set()
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        columns = range(place["x"], place["x"] + place["w"])
        own = {(x, y) for x in columns for y in range(place["y"], place["y"] + place["h"])}
        assert not own & cells, panel["title"]
        assert place["x"] + place["w"] <= 24
        cells |= own


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=60)


@needs_prometheus
def test_promtool_accepts_the_configuration_and_its_rules() -> None:
    done = promtool("check", "config", DEPLOY / "prometheus" / "prometheus.yml")
    assert done.returncode == 0, done.stderr + done.stdout
    assert f"{len(list(expressions(document(ALERTS))))} rules found" in done.stdout


@needs_prometheus
def test_promtool_refuses_a_broken_rule(tmp_path: Path) -> None:
    broken = tmp_path / "alerts.yml"
    broken.write_text(ALERTS.read_text(encoding="utf-8").replace("rate(", "rat(", 1), encoding="utf-8")
    assert promtool("check", "rules", broken).returncode != 0


@needs_prometheus
def test_each_alert_fires_when_it_should() -> None:
    cases = Path(__file__).parent / "alerts_test.yml"
    done = promtool("test", "rules", cases)
    assert done.returncode == 0, done.stdout + done.stderr
    named = {rule["alert"] for group in document(ALERTS)["groups"] for rule in group["rules"]}
    assert named == set(re.findall(r'alertname="(\w+)"', cases.read_text(encoding="utf-8")))


class Prometheus:
    """What a Prometheus at `url` answers."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **parameters: str) -> Any:
        with urllib.request.urlopen(f"{self.url}/{path}?{urllib.parse.urlencode(parameters)}", timeout=5) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[Any]:
        return self.get("api/v1/query", query=expression)["result"]


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A real one that has scraped a live exposition of weft.metrics at least four times."""
    directory = tmp_path_factory.mktemp("prometheus")
    metrics = Metrics()
    exposition, thread = start_http_server(0, "127.0.0.1", metrics.registry)
    config = document(DEPLOY / "prometheus" / "prometheus.yml")
    config["global"] = {"scrape_interval": "250ms", "scrape_timeout": "250ms", "evaluation_interval": "250ms"}
    config["rule_files"] = [str(ALERTS)]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{exposition.server_address[1]}"]}]
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={directory}/prometheus.yml",
                f"--storage.tsdb.path={directory}/data",
                f"--web.listen-address={address}",
                "--log.level=warn",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        server = Prometheus(f"http://{address}")
        give_up_at = time.monotonic() + 30
        scrapes = 0
        while scrapes < 4:
            assert process.poll() is None, (directory / "log").read_text()
            assert time.monotonic() < give_up_at, (directory / "log").read_text()
            time.sleep(0.1)
            live(metrics)
            try:
                found = server.query("count_over_time(weft_generation_tokens_total[1m])")
            except OSError:
                continue  # not listening or not ready yet
            scrapes = int(found[0]["value"][1]) if found else 0
        yield server
    finally:
        process.terminate()
        process.wait(30)
        exposition.shutdown()
        exposition.server_close()
        thread.join()


@needs_prometheus
def test_a_real_prometheus_scrapes_us(prometheus: Prometheus) -> None:
    [target] = prometheus.get("api/v1/targets")["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")
    [tokens] = prometheus.query("weft_generation_tokens_total")
    assert float(tokens["value"][1]) >= 2
    names = set(prometheus.get("api/v1/label/__name__/values"))
    assert exposed_names() <= names


@needs_prometheus
def test_a_real_prometheus_evaluates_our_alerts(prometheus: Prometheus) -> None:
    rules = [rule for group in prometheus.get("api/v1/rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in rules} == {r["alert"] for g in document(ALERTS)["groups"] for r in g["rules"]}
    assert {rule["health"] for rule in rules} == {"ok"}, rules


@needs_prometheus
@pytest.mark.parametrize("panel", dashboard()["panels"], ids=lambda panel: panel["title"])
def test_every_panel_shows_something(panel: Any, prometheus: Prometheus) -> None:
    for expression in expressions(panel):
        for variable, value in {"$__rate_interval": "1m", "$job": ".*", "$instance": ".*"}.items():
            expression = expression.replace(variable, value)
        points = prometheus.query(expression)
        assert points, expression
        assert all(point["value"][1] != "NaN" for point in points), expression
