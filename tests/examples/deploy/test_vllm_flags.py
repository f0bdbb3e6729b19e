"""Examples of deployments: vLLM's own parser takes what they start."""

from __future__ import annotations

import pytest

from tests.examples.deploy.files import Command, all_commands

pytestmark = pytest.mark.vllm

COMMANDS = [command for command in all_commands() if command.program == ("vllm", "serve")]


@pytest.fixture(scope="module")
def parser():
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser())


def test_there_is_a_prefill_and_a_decode_in_each_example():
    assert 6 == len(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.where)
def test_vllm_takes_its_flags(parser, command: Command):
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args

    args = parser.parse_args(command.flags)
    validate_parsed_serve_args(args)

    assert args.model_tag.startswith("/")
    assert args.enable_prompt_tokens_details and args.shutdown_timeout
    transfer = args.kv_transfer_config
    assert "ucm.integration.vllm.ucm_connector" == transfer.kv_connector_module_path
    assert {"UCM_CONFIG_FILE": "/etc/ucm/ucm.yaml"} == transfer.kv_connector_extra_config


def test_a_flag_that_vllm_does_not_have_is_refused(parser):
    with pytest.raises(SystemExit):
        parser.parse_args([*COMMANDS[0].flags, "--no-such-flag"])
