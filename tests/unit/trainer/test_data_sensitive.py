"""Secrets and personal data: what is found, what is not, and that nothing found is repeated."""

import random
import time

import pytest

from luthier_trainer.data.doctor.duplicates import content
from luthier_trainer.data.doctor.sensitive import may_be_sensitive, sensitive
from luthier_trainer.data.problem import Level
from luthier_trainer.data.records import Chat, Record, Text

_random = random.Random(4)


def key(length: int, alphabet: str = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789") -> str:
    return "a7Q" + "".join(_random.choice(alphabet) for _ in range(length - 3))


BODY = "\n".join(key(64) for _ in range(6))
SECRETS = {
    "a private key": f"-----BEGIN RSA PRIVATE KEY-----\n{BODY}\n-----END RSA PRIVATE KEY-----",
    "an AWS access key": "AKIA" + "Q7RZ4WK3M5TXB6UP",
    "an AWS session key": "ASIA" + "Q7RZ4WK3M5TXB6UP",
    "a Google API key": "AIza" + key(35),
    "a GitHub token": "ghp_" + key(36),
    "a GitLab token": "glpat-" + key(20),
    "a Slack token": "xoxb-" + "2315078412-" + key(24),
    "an Anthropic key": "sk-ant-api03-" + key(40),
    "an OpenAI key": "sk-proj-" + key(40),
    "a Stripe key": "sk_live_" + key(24),
    "a Hugging Face token": "hf_" + key(34),
    "a JSON Web Token": f"eyJ{key(20)}.eyJ{key(60)}.{key(43)}",
    "a password or key that is assigned": 'api_key = "9f8a7b6c5d4e3f2a1b0c9d8e7f6a5b4c"',
    "a URL with a password": "postgres://app:t0p5ecret@db.internal:5432/app",
}
PERSONAL = {
    "an e-mail address": ["grace.hopper+navy@mail.navy.mil", "x_1@a-b.co.uk."],
    "a phone number": [
        "+44 20 7946 0958",
        "+1 (212) 736-5000",
        "(212) 736-5000",
        "212-736-5000",
        "(+49 30 901820)",
        "+442079460958",
    ],
    "a credit card number": ["4539 1488 0343 6467", "4539148803436467", "3782-822463-10005"],
    "an IBAN": ["GB82 WEST 1234 5698 7654 32", "DE89370400440532013000", "NL91 ABNA 0417 1643 00 EUR"],
    "a US social security number": ["SSN 219-09-9999."],
}


def found(record: Record) -> dict[str, str]:
    """The findings of a row by their code, as the check finds them: with the cheap look first."""
    prompt, rest = content(record)
    if not may_be_sensitive((prompt or b"") + rest):
        return {}
    return {problem.code: problem.message for problem in sensitive(record)}


@pytest.mark.parametrize("around", ["%s", "It is %s, I think.", "line\n%s\nline", 'x = "%s"', "é%s", "(%s)"])
@pytest.mark.parametrize("kind", SECRETS)
def test_a_secret_is_found_and_never_repeated(kind: str, around: str) -> None:
    secret = SECRETS[kind]
    findings = found(Text(around % secret))
    assert findings["POSSIBLE_SECRET"] == f"The row seems to hold {kind} (text)."
    assert secret[:12] not in str(findings)


@pytest.mark.parametrize(
    ("kind", "secret"),
    [
        ("a Hugging Face token", "hf_AbCdEfGhIjKlMnOpQrStUvWxYzAbCdEfGh"),
        ("a Hugging Face token", "hf_" + "qTzRmWvKpLxYbNsJdHcGfAeUiOqZtMwVkP"),
        ("a GitHub token", "ghp_" + "qTzRmWvKpLxYbNsJdHcGfAeUiOqZtMwVkPxR"),
        ("an AWS access key", "AKIAQWERTYUIOPASDFGH"),
    ],
)
def test_a_token_of_letters_alone_is_found(kind: str, secret: str) -> None:
    assert found(Text(f"It is {secret}.")) == {"POSSIBLE_SECRET": f"The row seems to hold {kind} (text)."}


@pytest.mark.parametrize(
    "text",
    [
        "password=Tr0ub4dor&3xy",
        'PASSWORD: "k8Rw2#vN5qLz"',
        '{"password": "k8Rw2#vN5qLz"}',
        "client_secret = 'd41d8cd98f00b204e9800998ecf8427e'",
        "apiKey: 'x7Gh2Kq9Lm4Np8Rt'",
        "ACCESS_TOKEN=x7Gh2Kq9Lm4Np8Rt",
        "auth-token: x7Gh2Kq9Lm4Np8Rt",
    ],
)
def test_a_random_value_that_is_assigned_to_the_name_of_a_secret_is_found(text: str) -> None:
    assert found(Text(text)) == {"POSSIBLE_SECRET": "The row seems to hold a password or key that is assigned (text)."}


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in PERSONAL.items() for text in texts])
def test_personal_data_is_noted_and_never_repeated(kind: str, text: str) -> None:
    findings = found(Text(f"Write down: {text}\nThank you."))
    assert findings == {"POSSIBLE_PERSONAL_DATA": f"The row seems to hold {kind} (text)."}
    assert text not in str(findings)


@pytest.mark.parametrize(
    "text",
    [
        "Set OPENAI_API_KEY=sk-your-key-goes-here-and-nowhere-else",
        "sk-" + "x" * 48,
        "AKIAIOSFODNN7EXAMPLE",
        "ghp_" + "x" * 36,
        "risk-averse-and-low-maintenance-portfolio",
        "https://user:password@host.org/ and https://user:$PASSWORD@host.org and https://USER:<token>@host.org",
        "-----BEGIN PRIVATE KEY-----\n...\n-----END PRIVATE KEY-----",
        "hf_SomeVeryLongCamelCaseIdentifierName and hf_" + "x" * 34 + " and hf_YOURTOKENYOURTOKENYOURTOKENYOURTOK",
        "AKIAABCDEFGHIJKLMNOP and AKIAYOURACCESSKEYXYZ",
        "password: hunter2, password = correcthorsebatterystaple, pwd=Password123!, password=MyP@ssw0rd99x",
        "api_key = 'YOUR_API_KEY_1' and api_key=${API_KEY_V2} and api_key = settings.api_key2 and secret=abc123def456",
        "password = getPassword2Hash(user1) and secret: os.environ['S3_K3Y_4']",
        "PWD=/opt/x86_64/Lib3/v2 and api_key = conf_1.prod_v2 and secret_key=model_v2/layer_3/head_4",
        "The secret: 2024-01-02T10:11:12 is when. password: 123456789012, auth_token = header2Value",
        "git@github.com:acme/project.git",
        "yourname@yourdomain.com, boss@company.com, alice@email.com, John.Doe-123%+@example-domain.com",
        "john.doe@gmail.com, ada@mail.example.com, ada@your-company.com",
        "256626720691 + 1646615806005 = 4212883012996",  # begins as a card, and its check digit is right
        "12 +960397912423686 and 5 +442079460958 and x +442079460958 = 7 and +282079460958",
        "ada@example.com, root@localhost, icon@2x.png, react@18.2.0, @media print, a@b",
        "See https://acme.org/a_very_long_path_name_with_no_secret_in_it/1234567890123",
        "3.14159265358979323846264338327950288",
        "4539 1488 0343 6468",  # the check digit is wrong
        "1234567890123456",
        "GB82 WEST 1234 5698 7654 33",
        "MADE 2024 WITH MUCH CARE FROM PURE SILK",
        "123-45-6789, 000-12-3456, 1219-09-99991",
        "The sum of 123456789 and 987654321 is 1111111110.",
        "call 555-0100 or (212) 555-0100",
        "2024-01-02 10:11:12.123456789 and 10.20.30.40:8080 and 2e308",
    ],
)
def test_what_only_looks_like_it_is_left_alone(text: str) -> None:
    assert found(Text(text)) == {}


def test_all_kinds_of_a_row_are_in_one_finding_of_each_level_with_their_first_places() -> None:
    chat = Chat(
        [
            {"role": "user", "content": f"{SECRETS['a GitHub token']} ada@lovelace.org"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"type": "function", "function": {"name": "f", "arguments": {"k": SECRETS["a Google API key"]}}}
                ],
            },
            {"role": "user", "content": [{"type": "text", "text": "bob@builder.org or +44 20 7946 0958"}]},
        ]
    )
    problems = list(sensitive(chat))
    assert [(problem.level, problem.message) for problem in problems] == [
        (
            Level.WARNING,
            "The row seems to hold a GitHub token (turn 1, user) and a Google API key (turn 2, assistant).",
        ),
        (Level.NOTE, "The row seems to hold an e-mail address (turn 1, user) and a phone number (turn 3, user)."),
    ]
    assert all(problem.fix for problem in problems)


def test_common_rows_never_get_past_the_cheap_look() -> None:
    text = (
        "In 1969, 12 + 35 = 47; the state-of-the-art machine cost 1,250,000 dollars (or 3.5 %) at 10:45 on 2024-05-06. "
    )
    assert not may_be_sensitive(content(Text(text * 50))[1])


@pytest.mark.parametrize(
    "text",
    [
        "@" * 500_000,
        "a@" * 250_000,
        "a" * 500_000 + "@",
        "1 " * 250_000,
        "+1" * 250_000,
        "4" * 500_000,
        "eyJ" * 160_000 + "@",
        "eyJaaaaaaaaaaaa." * 30_000,
        "sk-" * 160_000,
        "://a:" * 100_000 + "@",
        "GB82WEST" * 60_000,
        "GB82 " * 100_000,
        "-----BEGIN PRIVATE KEY-----" * 20_000,
        "123-45-" * 70_000,
        "password=" * 60_000,
        "password: k8Rw2vN5qLz(" * 25_000,
        "a@" + "a." * 8 + "a@a.company." * 40_000,
        "+44 2" * 100_000,
    ],
)
def test_no_text_takes_long(text: str) -> None:
    begun = time.process_time()
    found(Text(text))
    assert time.process_time() - begun < 3
