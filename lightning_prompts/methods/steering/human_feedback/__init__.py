"""Iterative human feedback: the method, the choosers and the page."""

from lightning_prompts.methods.steering.human_feedback.choices import Choice, Chooser, Round, Scripted
from lightning_prompts.methods.steering.human_feedback.method import HumanFeedback
from lightning_prompts.methods.steering.human_feedback.page import Page

__all__ = ["Choice", "Chooser", "HumanFeedback", "Page", "Round", "Scripted"]
