# Chinese text has Chinese punctuation, and each of its characters counts as two columns.
# ruff: noqa: RUF001, E501
"""The text side of the embedded models: the sentences their tokenizer is trained on, and the chat template.

The sentences are customer-service talk in English and Chinese, with some JSON, put together from lists in a fixed order, so
every machine gets the same tokenizer. They are meant to fill a small vocabulary with whole words, not to teach a model
anything. Plain data and string work; only the other `embedded` modules use it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")  # one token each, but part of the text
PRODUCTS = (
    "order", "parcel", "invoice", "refund", "subscription", "account", "password", "payment", "credit card", "delivery", "phone",
    "laptop", "headphones", "charger", "printer", "router", "warranty", "coupon", "gift card", "flight", "hotel room", "ticket",
    "insurance", "contract", "bank transfer", "email address", "shopping cart", "return label", "monthly plan", "data plan",
)  # fmt: skip
STATES = (
    "has not arrived yet", "was damaged on the way", "is missing one part", "does not work any more", "was charged twice",
    "shows the wrong address", "cannot be cancelled on the website", "is later than you promised", "stopped working last night",
    "was sent to the wrong person", "still says pending", "keeps asking for a code", "has the wrong colour and size",
)  # fmt: skip
ASKS = (
    "Could you please help me with my {}?", "I would like to change my {} before Friday.", "Where can I find the number of my {}?",
    "How long does it take to replace a {}?", "Please cancel my {} and send the money back.", "What is the price of a new {}?",
    "My friend told me that your {} is better than the others.", "I have been waiting for my {} since Monday morning.",
    "Can someone call me today about the {}?", "Thank you, the problem with the {} is solved now.",
)  # fmt: skip
ANSWERS = (
    "I am sorry to hear that your {0} {1}.", "Let me check why your {0} {1}; it will only take a minute.",
    "Our support team knows that the {0} {1}, and we are working on it.", "If your {0} {1}, you can return it within thirty days.",
)  # fmt: skip
TALK = (
    "Hello! How can I help you today? Hi, good morning, good afternoon, good evening, welcome back and have a nice day.",
    "You are a helpful assistant. Answer in short, clear and friendly sentences, and use the tools when they are needed.",
    "We received your message and will answer within two business days. Please do not reply to this email.",
    "Which of these options do you want: standard shipping, express shipping, or pick up at the store?",
    "First open the settings, then choose your profile, click on the button, enter the new value and save it.",
    "It should be there by tomorrow. Otherwise we will give you a full refund, because that is what we promised.",
    "Yes, of course. No, unfortunately this is not possible. Maybe later. Sure, one moment please. You're welcome!",
    "I don't know, I can't see it, it's not mine, we'll try again, they've already gone, and he didn't say when.",
    "Tell me a story about the sea, the moon, the wind and a small boat that came home after many years of travel.",
    "What time is it in Paris, London, Berlin, New York, Tokyo, Beijing and Shanghai? The weather is sunny, with some rain and clouds.",
    "Write a short summary of the following text, explain the main idea, list three examples and count the words.",
    "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday; January, February, March, April, May, June, July, August, "
    "September, October, November, December.",
    "one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty hundred thousand million first second",
    "People use the internet every day to read news, watch videos, play games, learn languages, write code and talk with friends.",
    "The company opened another office in the city last year, and more than half of the workers now come from other countries.",
    "The cluster runs many models at once: a request comes in, a queue decides, an engine writes one token after another.",
    "System error: the server returned an unexpected response, please try again. Check the log file for details and report the issue.",
    "Large numbers such as 1,250.75 or 42% and dates such as 2025-03-14 10:30 are written with digits: 0 1 2 3 4 5 6 7 8 9.",
    "She said that her mother, father, brother and sister would always be happy to see you when you were in town.",
    "Great, thanks a lot for your quick answer! I really like this service, everything works perfectly and the quality is excellent.",
    "This is the worst experience I have ever had; nobody understands my question and I want to speak with a manager right now.",
    "Before we continue, please confirm your name, your date of birth, the last four digits of the card and the security question.",
)  # fmt: skip
PRODUCTS_ZH = (
    "订单", "包裹", "发票", "退款", "会员", "账户", "密码", "付款", "信用卡", "快递", "手机", "电脑", "耳机", "充电器", "打印机", "路由器", "保修", "优惠券", "礼品卡",
    "机票", "酒店", "门票", "保险", "合同", "转账", "邮箱", "购物车", "套餐", "地址", "商品",
)  # fmt: skip
SENTENCES_ZH = (
    "请问我的{}什么时候能到？", "您好，我想修改一下{}的信息。", "我的{}出现了问题，应该怎么办？", "非常抱歉，您的{}给您带来了不便。",
    "我们会在两个工作日内处理您的{}。", "请提供{}的号码，我马上帮您查询。", "谢谢您的耐心等待，{}已经处理好了。", "如果{}有任何问题，可以随时联系客服。",
)  # fmt: skip
TALK_ZH = (
    "你好！请问有什么可以帮助您的吗？早上好，下午好，晚上好，欢迎光临，祝您生活愉快，再见。", "你是一个有用的助手，请用简短、清楚、友好的句子回答问题。",
    "今天天气很好，明天可能会下雨，北京、上海、广州、深圳的气温都在下降。", "首先打开设置，然后选择个人资料，点击按钮，输入新的内容并保存。",
    "可以的，没有问题。不行，这个暂时不支持。请稍等一下，我需要确认。", "一二三四五六七八九十百千万，星期一到星期日，年月日时分秒，多少钱一个？",
    "这个东西质量不错，价格也便宜，我很喜欢，下次还会再来购买。", "他们说公司在国外开了新的办公室，大家都很高兴，因为工作机会更多了。",
    "请写一篇关于春天的短文，说明主要的意思，并且举三个例子。", "系统错误：服务器没有响应，请重新尝试，或者查看日志文件了解详细原因。",
    "我们已经收到了你的申请，审核通过以后会发送短信通知到你的手机上。", "这里是人工智能模型，每次只写一个词，能说中文和英文，但是还在学习。",
)  # fmt: skip
JSON_NAMES = ("name", "status", "city", "order_id", "quantity", "priority", "email", "date", "unit", "query", "amount", "reason")
JSON_VALUES = ('"open"', '"closed"', '"high"', '"low"', "true", "false", "null", "12", "3.5", '"Paris"', '["a", "b"]', "{}")

CHAT_TEMPLATE = """\
{%- macro text(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content is not none -%}
        {%- for part in content -%}{%- if part.text is defined -%}{{- part.text -}}{%- endif -%}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set system = namespace(rest=messages, given=none) -%}
{%- if messages and messages[0].role in ('system', 'developer') -%}
    {%- set system.given = text(messages[0].content) -%}
    {%- set system.rest = messages[1:] -%}
{%- endif -%}
{%- if tools -%}
    {{- '<|im_start|>system\\n' -}}
    {%- if system.given -%}{{- system.given + '\\n\\n' -}}{%- endif -%}
    {{- 'You may call these tools:\\n<tools>' -}}
    {%- for tool in tools -%}{{- '\\n' -}}{{- tool | tojson -}}{%- endfor -%}
    {{- '\\n</tools>\\nTo call one, answer with <tool_call>{"name": <name>, "arguments": <object>}</tool_call>.<|im_end|>\\n' -}}
{%- elif system.given is not none -%}
    {{- '<|im_start|>system\\n' + system.given + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in system.rest -%}
    {%- if message.role == 'tool' -%}
        {%- set opens = loop.first or system.rest[loop.index0 - 1].role != 'tool' -%}
        {{- '<|im_start|>user\\n' if opens else '\\n' -}}
        {{- '<tool_response>' + text(message.content) + '</tool_response>' -}}
        {%- if loop.last or system.rest[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
    {%- elif message.role in ('system', 'developer', 'user', 'assistant') -%}
        {{- '<|im_start|>' + ('system' if message.role == 'developer' else message.role) + '\\n' + text(message.content) -}}
        {%- for call in message.tool_calls or [] -%}
            {%- set function = call.function if call.function is defined else call -%}
            {%- if not loop.first or text(message.content) -%}{{- '\\n' -}}{%- endif -%}
            {{- '<tool_call>{"name": ' -}}{{- function.name | tojson -}}{{- ', "arguments": ' -}}
            {{- function.arguments if function.arguments is string else function.arguments | tojson -}}
            {{- '}</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\\n' -}}
    {%- else -%}
        {{- raise_exception('unknown role ' + message.role | string) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def sentences() -> Iterator[str]:
    """About 2,600 lines of text, always the same, in the same order."""
    for ask, thing in product(ASKS, PRODUCTS):
        yield ask.format(thing)
    for answer, thing, state in product(ANSWERS, PRODUCTS, STATES):
        yield answer.format(thing, state)
    for sentence, thing in product(SENTENCES_ZH, PRODUCTS_ZH):
        yield sentence.format(thing)
    for _ in range(4):  # one line of talk weighs as much as a few uses of a pattern
        yield from TALK
        yield from TALK_ZH
    for index, (name, value) in enumerate(product(JSON_NAMES, JSON_VALUES)):
        other = JSON_NAMES[(index * 7 + 1) % len(JSON_NAMES)]
        yield f'{{"name": "get_{name}", "arguments": {{"{name}": {value}, "{other}": {JSON_VALUES[index % 5]}}}}}'
