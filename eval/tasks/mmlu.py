"""MMLU (arXiv 2009.03300): 57 subjects of four-way questions, from the original CSV files or cais/mmlu as Parquet.

Prompt, categories and weights are those of lm-eval 0.4.13, `tasks/mmlu/default/*.yaml`; five examples are how MMLU is
reported (lm-eval needs `--num_fewshot 5` for it).
"""

from eval.records import Record
from eval.tasks import Group, Question, Task

LETTERS = ("A", "B", "C", "D")
# fmt: off
CATEGORIES = {
    "stem": """
        abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science
        college_mathematics college_physics computer_security conceptual_physics electrical_engineering
        elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science
        high_school_mathematics high_school_physics high_school_statistics machine_learning""",
    "other": """
        business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing
        medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology""",
    "social_sciences": """
        econometrics high_school_geography high_school_government_and_politics high_school_macroeconomics
        high_school_microeconomics high_school_psychology human_sexuality professional_psychology public_relations
        security_studies sociology us_foreign_policy""",
    "humanities": """
        formal_logic high_school_european_history high_school_us_history high_school_world_history
        international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory
        professional_law world_religions""",
}
# fmt: on


def mmlu(record: Record) -> Question:
    texts = record.texts("choices", 4) if "choices" in record else [record.text(letter) for letter in LETTERS]
    options = "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, texts, strict=True))
    context = f"{record.text('question').strip()}{options}\nAnswer:"
    return Question(context, list(LETTERS), record.label(LETTERS, "answer"))


def task(subject: str) -> Task:
    return Task(
        name=f"mmlu_{subject}",
        question=mmlu,
        test=(f"mmlu/test/{subject}_test", f"mmlu/{subject}/test"),
        examples=(f"mmlu/dev/{subject}_dev", f"mmlu/{subject}/dev"),
        shots=5,
        random_examples=False,
        description=(
            f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        ),
        columns=("question", *LETTERS, "answer"),
    )


TASKS = [task(subject) for subjects in CATEGORIES.values() for subject in sorted(subjects.split())]
GROUPS = [
    Group("mmlu", tuple(task.name for task in TASKS)),
    *(
        Group(f"mmlu_{category}", tuple(f"mmlu_{subject}" for subject in subjects.split()))
        for category, subjects in CATEGORIES.items()
    ),
]
