"""What a replica is at this moment -> its gauges, and the engine's own counts. Read at a scrape.

Does not cover requests (requests.py).
"""

import time
from importlib.metadata import version

from server.engine.stats import CacheUse, EngineStats
from server.errors import AuthenticationError, UnavailableError
from server.heartbeat import replica_name
from server.metrics.catalogue import StateFamilies
from server.metrics.families import Labels
from server.services import Services
from steering.models import device_of

_VERSION = version("deshift")


def read_state(services: Services) -> None:
    """Bring the metrics of `services` up to date."""
    services.metrics.refresh_tenants()
    families = services.metrics.state
    _serving(families, services)
    _counted(families, services.engine.stats())
    _policies(families, services)
    _fleet(families, services)
    _vectors(families, services)


def _serving(families: StateFamilies, services: Services) -> None:
    status, settings = services.engine.status(), services.settings
    families.running.set(status.num_running)
    families.waiting.set(status.num_waiting)
    families.in_flight.set(services.in_flight.count)
    families.max_rows.set(settings.max_rows)
    families.max_queue.set(settings.max_queue)
    families.kv_usage.set(status.kv_tokens_reserved / max(1, status.kv_tokens_budget))
    families.engine_up.set(status.state not in ("failed", "stopped"))
    families.ready.set(services.is_ready)
    families.draining.set(services.in_flight.is_draining)


def _counted(families: StateFamilies, stats: EngineStats) -> None:
    families.inter_token.replace({(): stats.inter_token_s})
    families.step.replace({(kind,): each for kind, each in stats.step_s.items()})
    families.vision_encode.replace({(): stats.vision_encode_s})
    families.prefill_tokens.replace({(k,): v for k, v in stats.prefill_tokens.items()})
    families.generated_tokens.set(stats.generated_tokens)
    families.failures.replace({(k,): v for k, v in stats.failures.items()})
    if stats.is_canary_passed is not None:
        families.canary.set(stats.is_canary_passed)
    prefix, vision = stats.prefix, stats.vision
    families.prefix_hits.replace({(asker,): use.hit_tokens for asker, use in prefix.items()})
    families.prefix_misses.replace({(asker,): use.missed_tokens for asker, use in prefix.items()})
    families.vision_hits.set(vision.hit_tokens)
    families.vision_misses.set(vision.missed_tokens)
    for name, use in (("prefix", prefix.get("own", CacheUse())), ("vision", vision)):
        families.cache_bytes.set(use.num_bytes, name)
        families.cache_limit.set(use.budget_bytes, name)


def _policies(families: StateFamilies, services: Services) -> None:
    directory, now = services.directory, time.time()
    alphas: dict[Labels, float] = {}
    revisions: dict[Labels, float] = {}
    policies: dict[Labels, float] = {}
    for tenant in services.metrics.tenants.own:
        try:
            policy = directory.policy(tenant, now)
        except (UnavailableError, AuthenticationError):
            continue  # nothing is in force for a tenant whose document could never be read
        is_steered = policy.is_active and directory.kill == "none"
        alphas[tenant,] = policy.alpha if is_steered else 0.0
        revisions[tenant,] = policy.revision
        policies[tenant, policy.mode, policy.method, str(policy.schedule)] = 1
    families.alpha.replace(alphas)
    families.policy_revision.replace(revisions)
    families.policy.replace(policies)
    for action in ("unsteered", "reject"):
        families.kill.set(directory.kill == action, action)
    families.tenants.set(directory.num_tenants)
    families.unreadable.set(len(directory.problems))


def _fleet(families: StateFamilies, services: Services) -> None:
    settings, identity, status = services.settings, services.engine.identity, services.sync.status
    replica = (replica_name(settings), _VERSION, identity.model_id)
    device = str(device_of(settings.device))
    families.replica.replace({(*replica, device, identity.dtype): 1})
    families.store_up.set(status.store != "unreachable")
    families.store_foreign.set(status.store == "foreign")
    families.store_revision.set(status.revision)
    if status.age_s is not None:
        families.policy_age.set(status.age_s)


def _vectors(families: StateFamilies, services: Services) -> None:
    """Of at most as many aliases as tenants have labels."""
    in_use = sorted(services.directory.aliases_in_use)
    shown = in_use[: services.settings.metrics_tenants + 1]
    ids, problems = services.vectors.ids, services.vectors.problems
    families.vectors.replace({(alias, ids[alias]): 1 for alias in shown if alias in ids})
    families.vectors_problem.replace({(alias,): alias in problems for alias in shown})
