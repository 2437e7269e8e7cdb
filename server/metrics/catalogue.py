"""Every metric of this server, declared in one class; the README's table is made of it.

Does not cover what gives them their values (requests.py, state.py).
"""

from collections.abc import Iterator

from server.metrics.families import Family, Histograms, Numbers, escaped

PREFIX = "deshift_"
OVERHEAD_S = (
    *(1e-5, 1e-4, 3e-4, 1e-3, 5e-3),
    *(1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
)
RATIO = (0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
PROJECTION = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
DOSE = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0)
SHORT_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
LATENCY_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0),
)
WAIT_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Declared:
    """Declares families under the prefix and with the constant label; `families` in order."""

    def __init__(self, model_name: str) -> None:
        self.families: list[Family] = []
        self._constant = f'model_name="{escaped(model_name)}"'

    def __iter__(self) -> Iterator[Family]:
        return iter(self.families)

    def _counter(self, name: str, help_text: str, *labels: str) -> Numbers:
        return self._numbers(Numbers("counter", PREFIX + name, help_text, labels, self._constant))

    def _gauge(self, name: str, help_text: str, *labels: str) -> Numbers:
        return self._numbers(Numbers("gauge", PREFIX + name, help_text, labels, self._constant))

    def _numbers(self, family: Numbers) -> Numbers:
        self.families.append(family)
        return family

    def _histogram(
        self, name: str, help_text: str, *labels: str, bounds: tuple[float, ...] = ()
    ) -> Histograms:
        """bounds: none for what the engine counts, which has its own."""
        family = Histograms(PREFIX + name, help_text, labels, bounds, self._constant)
        self.families.append(family)
        return family


class RequestFamilies(Declared):
    """Of POST /v1/chat/completions, filled as each request ends."""

    def __init__(self, model_name: str) -> None:
        super().__init__(model_name)
        self.requests = self._counter(
            "requests_total",
            "Chat requests that ended. mode: what was applied; outcome: success, cancelled, "
            "timeout, invalid, unauthorized, limited, unavailable or error.",
            *("tenant", "mode", "outcome"),
        )
        self.ttft = self._histogram(
            "time_to_first_token_seconds",
            "From a request's arrival to its first token, queueing included.",
            "mode",
            bounds=LATENCY_S,
        )
        self.e2e = self._histogram(
            "e2e_request_latency_seconds",
            "From a finished request's arrival to its last byte.",
            "mode",
            bounds=LATENCY_S,
        )
        self.queue_time = self._histogram(
            "request_queue_time_seconds", "Waiting for a row in the engine.", bounds=WAIT_S
        )
        self.prefill_time = self._histogram(
            "request_prefill_time_seconds",
            "From a row to the first token.",
            "mode",
            bounds=LATENCY_S,
        )
        self.image_decode = self._histogram(
            "image_decode_seconds", "Decoding the pictures of a request.", bounds=SHORT_S
        )
        self.prepare = self._histogram(
            "prompt_prepare_seconds",
            "Chat template and processor for a request's own prompt.",
            bounds=SHORT_S,
        )
        self.prompt_tokens = self._counter(
            "prompt_tokens_total", "Prompt tokens of finished requests.", "tenant"
        )
        self.generation_tokens = self._counter(
            "generation_tokens_total", "Generated tokens of finished requests.", "tenant"
        )
        self._declare_steering()

    def _declare_steering(self) -> None:
        self.overhead = self._histogram(
            "steering_overhead_seconds",
            "What steering cost a finished request that was steered, all stages together.",
            *("tenant", "mode"),
            bounds=OVERHEAD_S,
        )
        self.overhead_ratio = self._histogram(
            "steering_overhead_ratio",
            "The same as a share of the request's whole time.",
            *("tenant", "mode"),
            bounds=RATIO,
        )
        self.stage = self._histogram(
            "steering_stage_seconds",
            "The same by stage: shift (the passes of the two extra prompts, the token that a gate "
            "reads), inject (subtracting), store (taking the vectors), admission (policy, plan, "
            "making the two prompts).",
            *("mode", "stage"),
            bounds=OVERHEAD_S,
        )
        self.dose = self._histogram(
            "steering_relative_dose",
            "Largest |alpha w Delta| / |h| over the layers of a steered request.",
            "mode",
            bounds=DOSE,
        )
        self.projection = self._histogram(
            "steering_shift_projection",
            "How far a prompt with pictures lies from text, unsteered, where it was probed: 0 like "
            "text (or beyond it), 1 as far as a picture without content moves it.",
            "tenant",
            bounds=PROJECTION,
        )
        self.skipped = self._counter(
            "steering_skipped_total",
            "Finished requests that nothing was subtracted from, by the answer's reason.",
            *("tenant", "reason"),
        )


class StateFamilies(Declared):
    """Of this replica as it is, and what its engine and store calls have counted."""

    def __init__(self, model_name: str) -> None:
        super().__init__(model_name)
        self._declare_engine()
        self._declare_caches()
        self._declare_policies()
        self._declare_fleet()

    def _declare_engine(self) -> None:
        self.inter_token = self._histogram(
            "inter_token_latency_seconds", "Gaps between the tokens of one sequence."
        )
        self.running = self._gauge(
            "num_requests_running",
            "Rows of the engine that are taken: a request's choices, from its prefill on.",
        )
        self.waiting = self._gauge("num_requests_waiting", "Requests waiting for a row.")
        self.in_flight = self._gauge(
            "http_requests_in_flight", "HTTP requests of clients that are being answered."
        )
        self.max_rows = self._gauge("max_rows", "Limit of sequences decoded together.")
        self.max_queue = self._gauge("max_queue", "Limit of requests that wait.")
        self.kv_usage = self._gauge("kv_cache_usage_ratio", "KV tokens reserved over the budget.")
        self.step = self._histogram(
            "engine_step_seconds", "Engine steps, by kind: decode, prefill or mixed.", "kind"
        )
        self.prefill_tokens = self._counter(
            "engine_prefill_tokens_total",
            "Prompt tokens computed, by whose they were: own, shift (the sample level's pair) or "
            "probe.",
            "prompt",
        )
        self.generated_tokens = self._counter(
            "engine_generated_tokens_total",
            "Generated tokens, of requests that did not finish, too.",
        )
        self.failures = self._counter(
            "engine_failures_total",
            "Engine steps that failed (steps), steering that did not have its turn (hooks).",
            "kind",
        )
        self.vision_encode = self._histogram(
            "vision_encode_seconds", "Vision tower, for pictures that no cache had."
        )
        self.engine_up = self._gauge("engine_up", "1 while the engine's thread lives.")
        self.ready = self._gauge("ready", "1 while /ready answers 200.")
        self.draining = self._gauge("draining", "1 while new requests are refused to shut down.")
        self.canary = self._gauge(
            "canary_passed",
            "1 when the check of steering at start passed, 0 when it failed; absent before.",
        )

    def _declare_caches(self) -> None:
        self.prefix_hits = self._counter(
            "prefix_cache_hit_tokens_total",
            "Prompt tokens that the prefix cache had, by prompt: own or shift.",
            "prompt",
        )
        self.prefix_misses = self._counter(
            "prefix_cache_miss_tokens_total", "Prompt tokens that it did not have.", "prompt"
        )
        self.vision_hits = self._counter(
            "vision_cache_hit_tokens_total", "Picture features that the vision cache had."
        )
        self.vision_misses = self._counter(
            "vision_cache_miss_tokens_total", "Picture features that it did not have."
        )
        self.cache_bytes = self._gauge("cache_bytes", "Held by a cache: prefix or vision.", "cache")
        self.cache_limit = self._gauge("cache_limit_bytes", "What a cache may hold.", "cache")

    def _declare_policies(self) -> None:
        self.alpha = self._gauge(
            "steering_alpha",
            "Alpha in force for pictures: 0 when off or killed.",
            "tenant",
        )
        self.policy = self._gauge(
            "policy_info",
            "1, with what is in force.",
            *("tenant", "mode", "method", "schedule"),
        )
        self.policy_revision = self._gauge(
            "policy_revision", "Revision of the tenant's document in force; 0: settings.", "tenant"
        )
        self.kill = self._gauge(
            "kill_switch", "1 while it is in force, by action: unsteered or reject.", "action"
        )
        self.tenants = self._gauge("tenants", "Tenants with a policy from the store.")
        self.unreadable = self._gauge(
            "documents_unreadable", "Documents of the store that cannot be read."
        )

    def _declare_fleet(self) -> None:
        self.replica = self._gauge(
            "replica_info", "1.", *("replica", "version", "model", "device", "dtype")
        )
        self.store_up = self._gauge("store_up", "1 while the store answers.")
        self.store_foreign = self._gauge(
            "store_foreign", "1 while it holds other data than what is in force."
        )
        self.store_revision = self._gauge("store_revision", "Newest revision in force here.")
        self.policy_age = self._gauge(
            "policy_age_seconds",
            "Since the store last confirmed what is in force; absent before the first time.",
        )
        self.store_operation = self._histogram(
            "store_operation_seconds",
            "Calls of the store: read, heartbeat, vectors, commit, audit or replicas.",
            "operation",
            bounds=SHORT_S,
        )
        self.store_errors = self._counter(
            "store_errors_total", "Calls that failed or did not end in time.", "operation"
        )
        self.vectors = self._gauge(
            "vectors_info", "1 for each alias in use and its set in force.", "alias", "vector_id"
        )
        self.vectors_problem = self._gauge(
            "vectors_problem", "1 while an alias in use cannot be followed, else 0.", "alias"
        )
