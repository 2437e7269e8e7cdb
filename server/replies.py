"""The wire format of answers: whole, streamed, and the list of models, as OpenAI defines them.

Beside OpenAI's fields each answer has `steering`: what was done to it.
"""

from typing import Literal

from pydantic import BaseModel


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobContent(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    content: list[TokenLogprobContent]
    refusal: None = None


class PromptTokensDetails(BaseModel):
    """`cached_tokens`: how many of the prompt's tokens the prefix cache had."""

    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class SteeringReport(BaseModel):
    """What was done to this answer; `reason` says why nothing, and is null when something was.

    `alpha` is the strength applied: the policy's, times the share `gate_opening` (0 to 1) that its
    gate let through for this prompt; null without a gate. `vector` is null where no vector set
    takes part, `corruption` where no shift of the request's own is measured. `overhead_ms` is the
    time that steering took of this request: the plan, `shift_ms` for measuring its own shift, with
    making the two prompts for it, and for what its gate reads, and the subtracting. A shift that
    could not be measured has cost its time too.
    """

    mode: str
    alpha: float
    gate_opening: float | None
    method: str | None
    schedule: str | None
    vector: str | None
    corruption: str | None
    revision: int
    relative_dose: float
    overhead_ms: float
    shift_ms: float
    reason: str | None


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    steering: SteeringReport


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class ChatCompletionChunk(BaseModel):
    """Dumped with exclude_unset: `usage` and `steering` appear where they were given.

    `steering_revision`: of the policy that was in force when the request was admitted.
    """

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    steering_revision: int
    usage: Usage | None = None
    steering: SteeringReport | None = None


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "deshift"
    max_model_len: int  # prompt plus answer, in tokens; vLLM names it so


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]
