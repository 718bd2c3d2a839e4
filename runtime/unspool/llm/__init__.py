"""The Python API: a model in this process, its generations and its sessions."""

from unspool.llm.generation import Conversation, Message, Prompt
from unspool.llm.llm import LLM
from unspool.llm.options import LLMArguments
from unspool.llm.outputs import CompletionOutput, Logprob, RequestOutput, TurnOutput
from unspool.llm.params import SamplingParams
from unspool.llm.sample import StreamPiece
from unspool.llm.session import Session
from unspool.llm.turn import TurnPiece

__all__ = [
    "LLM",
    "CompletionOutput",
    "Conversation",
    "LLMArguments",
    "Logprob",
    "Message",
    "Prompt",
    "RequestOutput",
    "SamplingParams",
    "Session",
    "StreamPiece",
    "TurnOutput",
    "TurnPiece",
]
