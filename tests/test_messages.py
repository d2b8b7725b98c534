from metalr_hf.messages import did_you_mean, first_line


def test_names_that_begin_alike_go_before_those_that_look_alike():
    known = ["meta_every", "meta_split", "meta_splits", "hyper_lr"]
    assert did_you_mean("meta_spl", known) == " Did you mean 'meta_split' or 'meta_splits'?"
    assert did_you_mean("hyper_rl", known, "There are four.") == " Did you mean 'hyper_lr'?"


def test_where_nothing_is_near_nothing_is_guessed():
    assert did_you_mean("xyz", ["cosine"]) == ""
    assert did_you_mean("xyz", ["cosine"], "There is one.") == " There is one."
    assert did_you_mean("cosy", ["cosine"], cutoff=0.7) == ""
    assert did_you_mean("cosy", ["cosine"], cutoff=0.4) == " Did you mean 'cosine'?"


def test_the_first_line_of_an_error():
    assert first_line(ValueError("\n no such model\nlook here")) == "no such model"
    assert first_line(KeyboardInterrupt()) == "KeyboardInterrupt"
