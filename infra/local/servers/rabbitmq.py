"""A private RabbitMQ node with its own epmd: everything on loopback, own cookie, own user; `guest` never exists.

The node's name may be the same in every clone: names are looked up at epmd, and each clone has its own.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from infra.local.failures import SetupFailed
from infra.local.layout import write_private
from infra.local.probes import EpmdProbe, HttpProbe
from infra.local.process_spec import ProcessSpec

SERVER = Path(
    "/usr/lib/rabbitmq/bin/rabbitmq-server"
)  # the one in /usr/sbin insists on root or the rabbitmq user
NODE = "roundhouse@localhost"
USER = "roundhouse"
VHOST = "roundhouse"

# Longest time a message may stay unacknowledged. Job deadlines must fit into it; the broker's default, made explicit.
CONSUMER_TIMEOUT_S = 1800
# Of anybody's message: what is larger ends its channel. Ours have at most half of it; the default of 3.10 is 128 MiB.
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
PLUGINS = ("rabbitmq_management", "rabbitmq_prometheus")
# Two schedulers that sleep instead of spinning: the node shares two cores with everything else.
ERLANG_FLAGS = "+S 2:2 +sbwt none +sbwtdcpu none +sbwtdio none -kernel inet_dist_use_interface {127,0,0,1}"

CONFIGURATION = """\
listeners.tcp.1 = 127.0.0.1:{amqp_port}
management.tcp.ip = 127.0.0.1
management.tcp.port = {management_port}
prometheus.tcp.ip = 127.0.0.1
prometheus.tcp.port = {prometheus_port}
default_user = {user}
default_pass = {password}
default_vhost = {vhost}
default_permissions.configure = .*
default_permissions.read = .*
default_permissions.write = .*
consumer_timeout = {consumer_timeout_ms}
max_message_size = {max_message_bytes}
disk_free_limit.absolute = 200MB
vm_memory_high_watermark.absolute = 1GB
log.console = true
log.console.level = warning
log.file = false
"""


@dataclass(frozen=True, slots=True)
class PrivateRabbit:
    folder: Path
    amqp_port: int
    management_port: int
    prometheus_port: int
    epmd_port: int
    distribution_port: int
    password: str = field(repr=False)
    cookie: str = field(repr=False)

    @property
    def url(self) -> str:
        return (
            f"amqp://{USER}:{self.password}@127.0.0.1:{self.amqp_port}/{urllib.parse.quote(VHOST, safe='')}"
        )

    @property
    def management_url(self) -> str:
        return f"http://{USER}:{self.password}@127.0.0.1:{self.management_port}"

    def prepare(self) -> None:
        """Write the node's files anew each time (ports may have moved); its data are left as they are."""
        if not SERVER.exists():
            raise SetupFailed("rabbitmq-server is not installed: run 'make up' again, which installs it")
        for name in ("data", "log"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        text = CONFIGURATION.format(
            amqp_port=self.amqp_port,
            management_port=self.management_port,
            prometheus_port=self.prometheus_port,
            user=USER,
            password=self.password,
            vhost=VHOST,
            consumer_timeout_ms=CONSUMER_TIMEOUT_S * 1000,
            max_message_bytes=MAX_MESSAGE_BYTES,
        )
        write_private(self.folder / "rabbitmq.conf", text)
        write_private(self.folder / "enabled_plugins", f"[{','.join(PLUGINS)}].\n")
        write_private(self.folder / ".erlang.cookie", self.cookie)  # 0600 as Erlang demands

    def specs(self, env: Mapping[str, str]) -> list[ProcessSpec]:
        erlang_env = {
            **env,
            "HOME": str(self.folder),
            "ERL_EPMD_PORT": str(self.epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
        }
        rabbit_env = {
            **erlang_env,
            "RABBITMQ_NODENAME": NODE,
            "RABBITMQ_NODE_PORT": str(self.amqp_port),
            "RABBITMQ_DIST_PORT": str(self.distribution_port),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "data"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "enabled_plugins"),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": ERLANG_FLAGS,
            # Every Erlang of the start script would start an epmd of its own, in the background, if ours is not up.
            "ERL_FLAGS": "-start_epmd false",
            "RABBITMQ_LOG": "-color",
            # Makes the start script become the node instead of staying its parent: one pid, plain signals.
            "RUNNING_UNDER_SYSTEMD": "true",
        }
        epmd = ProcessSpec(
            name="epmd",
            command=("epmd", "-address", "127.0.0.1", "-port", str(self.epmd_port)),
            env=erlang_env,
            ready=EpmdProbe(self.epmd_port),
            ready_timeout_s=15.0,
        )
        rabbitmq = ProcessSpec(
            name="rabbitmq",
            command=(str(SERVER),),
            env=rabbit_env,
            depends_on=("epmd",),
            prepare=self.prepare,
            # Answers only when the node, its listeners and the management plugin are up, and checks the password.
            ready=HttpProbe(
                f"http://127.0.0.1:{self.management_port}/api/health/checks/port-listener/{self.amqp_port}",
                USER,
                self.password,
            ),
            ready_timeout_s=90.0,
            stop_deadline_s=20.0,
        )
        return [epmd, rabbitmq]
