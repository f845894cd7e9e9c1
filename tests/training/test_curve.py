"""The picture of the loss curve."""

from megatron_bert_tp.training.curve import draw_loss_curve


def test_the_picture_is_a_png_of_the_run(finished_run, tmp_path):
    picture = tmp_path / "loss.png"
    draw_loss_curve(finished_run / "metrics.jsonl", picture, title="test")
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG")
    # An empty pair of axes of this size takes about 12 kB; lines and a legend take more.
    assert len(content) > 20_000
