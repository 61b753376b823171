"""A small BERT, from scratch, with the Trainer of Transformers.

It tells the documentation of NumPy from that of PyTorch: lines of docstrings, as bytes, with those
of every fifth function for testing.
"""
# Needs: transformers
# Needs: accelerate
# Reaches: accuracy 0.7

import inspect
import tempfile

import numpy
import torch
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from wsam_fused import WSAM
from wsam_fused.integrations.transformers import SharpnessAwareTrainer

LENGTH = 40
LIBRARIES = {
    0: (numpy, numpy.linalg, numpy.fft, numpy.random),
    1: (torch, torch.nn.functional, torch.linalg, torch.optim),
}


def docstrings(module: object) -> list[str]:
    """Return the docstrings of the functions and classes of a module, each once."""
    texts = [inspect.getdoc(getattr(module, name, None)) for name in dir(module)]
    return list(dict.fromkeys(text for text in texts if text and len(text) > 200))


def lines(text: str) -> list[str]:
    """Return the lines that have something to say."""
    return [line.strip() for line in text.splitlines() if len(line.strip()) > 30][:5]


def sample(line: str, label: int) -> dict:
    """Return the bytes of a line, 0 behind its end."""
    words = torch.tensor(list(line.encode("ascii", "ignore")[:LENGTH]))
    words = torch.nn.functional.pad(words, (0, LENGTH - len(words)))
    return {"input_ids": words, "attention_mask": (words > 0).long(), "labels": label}


train, test = [], []
for label, modules in LIBRARIES.items():
    texts = list(dict.fromkeys(text for module in modules for text in docstrings(module)))
    for i, text in enumerate(texts[:300]):
        (test if i % 5 == 0 else train).extend(sample(line, label) for line in lines(text))

torch.manual_seed(0)
config = BertConfig(
    vocab_size=128,
    hidden_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    intermediate_size=96,
    max_position_embeddings=LENGTH,
)
model = BertForSequenceClassification(config)
optimizer = WSAM(model.parameters(), torch.optim.AdamW, rho=0.05, gamma=0.8, lr=3e-3)


def metrics(prediction: object) -> dict:
    found = prediction.predictions.argmax(1)
    return {"accuracy": float((found == prediction.label_ids).mean())}


with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        num_train_epochs=4,
        per_device_train_batch_size=64,
        lr_scheduler_type="cosine",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = SharpnessAwareTrainer(
        model,
        arguments,
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=metrics,
        optimizers=(optimizer, None),
    )
    trainer.train()
    reached = trainer.evaluate()["eval_accuracy"]

print(f"lines: {len(train)} and {len(test)}")
print(f"accuracy: {reached:.3f}")
