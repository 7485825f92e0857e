"""How people write tickets: templates per language. Data only.

All but UNSEEN are used in pre-training and SFT; UNSEEN only in tests. `{product}` always comes with `{issue}`, which says what is wrong and decides the category.
"""

# ruff: noqa: E501
# fmt: off

FIELDS = ("name", "order", "product", "city", "date", "amount")

CLAUSES: dict[str, dict[str, list[str]]] = {
    "en": {
        "name": [
            "Customer {name}.", "I am {name}.", "My name is {name}.", "This is {name}.", "Reported by {name}.",
            "The buyer is {name}.", "{name} wrote to us.", "Contact person: {name}.", "It was bought by {name}.",
            "A customer called {name} is waiting.", "Please ask for {name}.", "Yours, {name}.",
        ],
        "order": [
            "Order {order}.", "The order number is {order}.", "My order is {order}.", "Order id: {order}.",
            "Reference {order}.", "This concerns order {order}.", "See order {order}.", "The case belongs to {order}.",
            "It has the number {order}.", "I mean order {order}.",
        ],
        "product": [
            "The {product} {issue}.", "My {product} {issue}.", "The {product} I bought {issue}.",
            "Problem: the {product} {issue}.", "It is about a {product} that {issue}.", "Sadly the {product} {issue}.",
            "Our {product} {issue}!", "The new {product} {issue}.",
        ],
        "city": [
            "From {city}.", "I live in {city}.", "It was sent to {city}.", "The parcel went to {city}.",
            "City: {city}.", "Writing from {city}.", "The address is in {city}.", "Delivery to {city}.",
            "Our home is in {city}.",
        ],
        "date": [
            "Bought on {date}.", "It was bought on {date}.", "Ordered on {date}.", "The purchase date is {date}.",
            "I ordered it on {date}.", "Date: {date}.", "That was on {date}.", "Sale of {date}.",
        ],
        "amount": [
            "Paid {amount} yuan.", "It cost {amount} yuan.", "The price was {amount} yuan.", "Total {amount} yuan.",
            "I spent {amount} yuan.", "The bill was {amount} yuan.", "Price: {amount} yuan.",
            "{amount} yuan were paid.",
        ],
    },
    "zh": {
        "name": [
            "客户{name}。", "我叫{name}。", "我是{name}。", "联系人{name}。", "买家是{name}。", "{name}反映。", "报告人:{name}。",
            "客户姓名是{name}。", "由{name}购买。", "有事请找{name}。", "顾客{name}在等回复。",
        ],
        "order": [
            "订单{order}。", "订单号是{order}。", "我的订单是{order}。", "单号:{order}。", "编号{order}。", "这是订单{order}的问题。",
            "请看订单{order}。", "说的是{order}这一单。", "订单编号为{order}。",
        ],
        "product": [
            "{product}{issue}。", "我的{product}{issue}。", "买的{product}{issue}。", "问题:{product}{issue}。",
            "那个{product}{issue}。", "新买的{product}{issue}!", "可是{product}{issue}。",
        ],
        "city": [
            "来自{city}。", "我住在{city}。", "寄到{city}。", "包裹送往{city}。", "城市:{city}。", "地址在{city}。", "收货地是{city}。",
            "人在{city}。",
        ],
        "date": [
            "{date}购买。", "购买日期是{date}。", "{date}下的单。", "我在{date}买的。", "日期:{date}。", "时间是{date}。", "下单时间为{date}。",
        ],
        "amount": [
            "支付{amount}元。", "花了{amount}元。", "价格{amount}元。", "一共{amount}元。", "付款{amount}元。", "金额:{amount}元。",
            "总价为{amount}元。",
        ],
    },
}

# The key names the two fields a template holds.
PAIRS: dict[str, dict[tuple[str, str], list[str]]] = {
    "en": {
        ("name", "city"): [
            "{name} from {city} contacted us.", "I am {name} and I live in {city}.", "{name} in {city} complains.",
            "The customer is {name}, {city}.", "{name} ({city}) called.", "We heard from {name} of {city}.",
        ],
        ("amount", "date"): [
            "Paid {amount} yuan on {date}.", "On {date} I paid {amount} yuan.", "{amount} yuan, {date}.",
            "I spent {amount} yuan on {date}.", "The bill of {date} says {amount} yuan.",
        ],
        ("order", "date"): [
            "Order {order} was placed on {date}.", "On {date} I placed order {order}.", "Order {order} of {date}.",
            "Order {order}, dated {date}.",
        ],
        ("name", "order"): [
            "Order {order} by {name}.", "{name} asks about order {order}.", "{name}, order {order}.",
            "Order {order} belongs to {name}.",
        ],
        ("order", "product"): [
            "Order {order}: the {product} {issue}.", "The {product} in order {order} {issue}.",
            "The {product} (order {order}) {issue}.", "In order {order} the {product} {issue}.",
        ],
        ("product", "amount"): [
            "The {product} cost {amount} yuan and {issue}.", "The {product} for {amount} yuan {issue}.",
            "I paid {amount} yuan for a {product} and it {issue}.",
        ],
        ("product", "date"): [
            "The {product} bought on {date} {issue}.", "On {date} I ordered a {product} and it {issue}.",
        ],
        ("product", "city"): [
            "The {product} sent to {city} {issue}.", "Here in {city} the {product} {issue}.",
        ],
        ("order", "amount"): ["Order {order} cost {amount} yuan.", "{amount} yuan for order {order}."],
        ("order", "city"): ["Order {order} goes to {city}.", "Order {order}, {city}."],
    },
    "zh": {
        ("name", "city"): [
            "{city}的{name}反映。", "我是{city}的{name}。", "我叫{name},住在{city}。", "客户{name}({city})来电。", "{name},{city}。",
            "来自{city}的{name}说。",
        ],
        ("amount", "date"): [
            "{date}支付{amount}元。", "{date}花了{amount}元。", "{amount}元,{date}。", "我在{date}付了{amount}元。",
        ],
        ("order", "date"): ["订单{order}于{date}下单。", "{date}下了订单{order}。", "订单{order},{date}。"],
        ("name", "order"): ["{name}的订单{order}。", "{name}询问订单{order}。", "订单{order}是{name}的。", "{name},单号{order}。"],
        ("order", "product"): [
            "订单{order}:{product}{issue}。", "订单{order}里的{product}{issue}。", "{product}(订单{order}){issue}。",
            "{order}这一单的{product}{issue}。",
        ],
        ("product", "amount"): [
            "{amount}元买的{product}{issue}。", "{product}花了{amount}元,却{issue}。", "价格{amount}元的{product}{issue}。",
        ],
        ("product", "date"): ["{date}买的{product}{issue}。", "{date}下单的{product}{issue}。"],
        ("product", "city"): ["寄到{city}的{product}{issue}。", "我在{city},{product}{issue}。"],
        ("order", "amount"): ["订单{order}共{amount}元。", "{order}这一单{amount}元。"],
        ("order", "city"): ["订单{order}寄往{city}。", "订单{order},{city}。"],
    },
}

FULL: dict[str, list[str]] = {
    "en": [
        "{name} from {city} writes that the {product} in order {order} {issue}. It was bought on {date} for {amount} yuan.",
        "Order {order}: the {product} {issue}. Customer {name}, {city}, paid {amount} yuan on {date}.",
        "Hello, this is {name} in {city}. On {date} I paid {amount} yuan for a {product} (order {order}) and it {issue}.",
        "My order {order} has a problem! I am {name}, I live in {city}, and the {product} {issue}. It cost {amount} yuan on {date}.",
        "On {date} {name} bought a {product} for {amount} yuan. Order {order}, sent to {city}. Now it {issue}.",
        "Ticket for {order}. Buyer: {name}, {city}. The {product} {issue}. {amount} yuan, {date}.",
        "The {product} {issue}, says {name} of {city}. The order number is {order}, placed on {date}, {amount} yuan.",
        "I spent {amount} yuan on a {product} on {date} and it {issue}. Please check order {order}. {name}, {city}.",
        "{date}, {city}: {name} called about order {order}. The {product} for {amount} yuan {issue}.",
        "Please help {name}: order {order} from {date} went to {city}, it cost {amount} yuan, and the {product} {issue}.",
        "A {product} sold to {name} in {city} on {date} {issue}. Paid {amount} yuan under order {order}.",
        "Dear team, I want my {amount} yuan back. The {product} from order {order} ({date}) {issue}. {name} from {city}.",
        "After paying {amount} yuan on {date}, {name} got a {product} that {issue}. Order {order}, {city}.",
        "When it came to {city}, the {product} {issue}. Please note order {order} of {date}, {amount} yuan. Thanks, {name}.",
        "Phone report: {name} in {city} says that the {product} {issue}. Order {order}. Price {amount} yuan, day of sale {date}.",
        "How is it that the {product} {issue}? My order is {order}, I paid {amount} yuan on {date}, and I am {name} from {city}.",
        "Dear shop, on {date} you sold me a {product} for {amount} yuan. It {issue}. See {order}. Greetings, {name}, {city}.",
        "Urgent! {city}, order {order}: the {product} {issue}. {name} paid {amount} yuan for it on {date}.",
        "According to {name}, who lives near {city}, the {product} from {date} {issue}. Price {amount} yuan, number {order}.",
        "Nobody answers my mails about {order}. The {product} {issue}, it was {amount} yuan on {date}. My name: {name}. My town: {city}.",
        "Return request {order}. {date}, {amount} yuan, {product}. Cause: it {issue}. Sender: {name}, {city}.",
        "Yesterday {name} came to our desk in {city} with a {product} that {issue}. Number {order}, bought {date}, {amount} yuan.",
        "Sorry to bother you. The {product} you sent to {city} {issue}. Order {order}, {date}, {amount} yuan. {name}",
        "Message from {city}: {name} wants {amount} yuan back, as the {product} ordered on {date} under {order} {issue}.",
        "We received a letter. {name} of {city} bought a {product} on {date}. Order {order}, {amount} yuan. The thing {issue}.",
        "Not nice: {amount} yuan paid, {date}, and the {product} {issue}. Look at {order}. {city}, {name}.",
        "Chat of {date}. Guest: {name}. Place: {city}. Topic: the {product} {issue}. Number {order}. Value {amount} yuan.",
        "Every time I buy from you something happens. Now the {product} {issue}. {order}, {date}, {amount} yuan, {city}. {name}.",
        "Let me explain. My name is {name}. The {product} I got for {amount} yuan {issue}. I live in {city}. Order {order} was made on {date}.",
        "Who can help? A {product} for {amount} yuan, bought on {date}, {issue}. It is order {order}. I write from {city}. {name}",
        "Broken promises again, dear team: {product}, order {order}, {issue}. {date}. {amount} yuan. {name} from {city}.",
        "In {city} lives {name}, an old client. On {date} order {order} for {amount} yuan was placed, but the {product} {issue}.",
    ],
    "zh": [
        "{city}的{name}反映,订单{order}里的{product}{issue},{date}购买,花了{amount}元。",
        "订单{order}:{product}{issue}。客户{name},{city},{date}支付{amount}元。",
        "你好,我是{city}的{name},{date}花{amount}元买的{product}(订单号{order}){issue}。",
        "我的订单{order}有问题!我叫{name},住在{city},{product}{issue},{date}买的,{amount}元。",
        "{date},{name}用{amount}元买了{product},订单{order},寄到{city},现在{issue}。",
        "工单{order}。买家:{name},{city}。{product}{issue}。{amount}元,{date}。",
        "{product}{issue},{city}的{name}说。订单号是{order},{date}下单,{amount}元。",
        "我在{date}花了{amount}元买{product},结果{issue}。请查一下订单{order}。{name},{city}。",
        "{date}{city}来电:{name}的订单{order},{amount}元的{product}{issue}。",
        "请帮帮{name}:订单{order}是{date}下的,寄往{city},一共{amount}元,可是{product}{issue}。",
        "卖给{city}{name}的{product}{issue},{date}付款{amount}元,单号{order}。",
        "客服你好,我要退{amount}元。订单{order}({date})的{product}{issue}。{city},{name}。",
        "{name}{date}在{city}下单,订单{order},{product}{issue},共{amount}元。",
        "{city}{name}{date}买的{product}{issue},花了{amount}元,单号{order}。",
        "{date}我花了{amount}元,订单{order},收货地{city},{product}{issue}。{name}留言。",
        "来信摘要:{name}住{city},{date}付了{amount}元,{order}号订单的{product}{issue}。",
        "急!{order}的{product}{issue}。{amount}元,{date},{city},{name}。",
        "为什么{product}{issue}?{city}{name},订单{order},{date},{amount}元。",
        "退货单{order}:{product},{date},{amount}元,原因是{issue}。寄件人{name},{city}。",
        "贵店{date}卖给我的{product}{issue},订单{order},金额{amount}元,我是{city}的{name}。",
        "客服记录:{date}{name}从{city}打来电话,说{amount}元的{product}{issue},单号{order}。",
        "我在{city},叫{name}。付给店里{amount}元的{product}{issue},{date}的订单{order}。",
        "听{name}说,{date}寄到{city}的{product}{issue},订单{order}花了{amount}元。",
        "先说清楚:{order}是我{name}{date}下的,{amount}元,送{city},可{product}{issue}。",
        "{amount}元的{product}{issue},太让人失望了。{name},{city},{order},{date}。",
        "付了{amount}元,{date}发的{product}却{issue},{city}{name},订单{order}。",
    ],
}

# How a field can stand inside any sentence; `compose` strings these together with fillers between.
CUES: dict[str, dict[str, list[str]]] = {
    "en": {
        "name": [
            "{name}", "{name}", "{name}", "I am {name}", "I, {name},", "customer {name}", "our client {name}", "buyer {name}", "for {name}", "by {name}",
            "with {name}", "this is {name}", "signed {name}", "says {name}", "{name} says", "{name} writes",
            "{name} reports", "{name} wants an answer", "told {name}", "called {name}", "a person named {name}", "{name} and family", "{name} is upset",
            "the name is {name}", "under the name {name}", "{name} speaking", "dear {name}", "attention {name}", "({name})", "yours {name}", "ask {name}",
            "hi, {name} again", "written by {name}", "paid by {name}", "owner {name}", "{name} never got a reply", "our guest {name}",
        ],
        "order": [
            "{order}", "{order}", "order {order}", "the order {order}", "no. {order}", "number {order}", "under {order}", "about {order}", "see {order}",
            "({order})", "order no. {order}", "my order {order}", "ref. {order}", "file {order}", "receipt {order}", "with id {order}", "order id {order}",
            "{order} is the order", "paper {order}", "ticket {order}", "case {order}", "bill {order}", "as in {order}", "regarding {order}", "shipment {order}",
        ],
        "product": [
            "the {product} {issue}", "my {product} {issue}", "a {product} that {issue}", "our {product} {issue}", "this {product} {issue}",
            "your {product} {issue}", "the {product} which {issue}", "{product}: {issue}", "{product} ({issue})", "the {product}, as it {issue}",
            "one {product} {issue}", "the same {product} {issue}", "{product}, {issue}", "that the {product} {issue}", "as the {product} {issue}",
            "because the {product} {issue}", "the {product} still {issue}", "such a {product}, it {issue}", "the {product} here {issue}",
        ],
        "city": [
            "{city}", "{city}", "in {city}", "from {city}", "to {city}", "at {city}", "near {city}", "of {city}", "({city})", "{city} branch", "our {city} home",
            "here in {city}", "{city} office", "via {city}", "around {city}", "greetings from {city}", "sent to {city}", "living in {city}", "based in {city}",
            "bound for {city}", "{city} is my home", "people of {city}", "{city} side", "outside {city}", "{city} again",
        ],
        "date": [
            "{date}", "on {date}", "since {date}", "dated {date}", "({date})", "of {date}", "from {date}", "the {date} sale", "that was {date}", "by {date}",
            "before {date}", "until {date}", "on the day {date}", "back on {date}", "as of {date}", "bought {date}", "ordered {date}", "it was {date}",
        ],
        "amount": [
            "{amount} yuan", "for {amount} yuan", "({amount} yuan)", "paid {amount} yuan", "at {amount} yuan", "costing {amount} yuan", "price {amount} yuan",
            "the {amount} yuan", "all {amount} yuan", "my {amount} yuan", "exactly {amount} yuan", "worth {amount} yuan", "of {amount} yuan", "{amount} yuan each",
            "{amount} yuan in total", "spent {amount} yuan", "owed {amount} yuan", "charged {amount} yuan", "with {amount} yuan",
        ],
    },
    "zh": {
        "name": ["{name}", "{name}", "我是{name}", "客户{name}", "本人{name}", "{name}说", "{name}来信", "由{name}", "给{name}", "署名{name}", "叫{name}的人", "找{name}", "{name}本人", "({name})"],
        "order": ["{order}", "{order}", "订单{order}", "单号{order}", "编号{order}", "关于{order}", "({order})", "{order}号", "查{order}", "票据{order}", "凭{order}"],
        "product": ["{product}{issue}", "这{product}{issue}", "我的{product}{issue}", "那个{product},{issue}", "{product}({issue})", "所购{product}{issue}", "说{product}{issue}", "因为{product}{issue}"],
        "city": ["{city}", "{city}", "在{city}", "从{city}", "到{city}", "({city})", "{city}人", "{city}这边", "发到{city}", "家在{city}", "{city}门店"],
        "date": ["{date}", "于{date}", "从{date}起", "({date})", "{date}那天", "自{date}", "{date}的单", "{date}当天"],
        "amount": ["{amount}元", "共{amount}元", "({amount}元)", "收{amount}元", "付{amount}元", "值{amount}元", "{amount}元的", "退{amount}元"],
    },
}

# What a form calls a field; `issue` stands beside `product`.
LABELS: dict[str, dict[str, list[str]]] = {
    "en": {
        "name": ["Name", "Customer", "Buyer", "Client", "name", "customer"],
        "order": ["Order", "Order number", "Order id", "No", "order"],
        "product": ["Product", "Item", "Article", "product"],
        "city": ["City", "Town", "Place", "city"],
        "date": ["Date", "Bought on", "Day", "date"],
        "amount": ["Amount", "Price", "Total", "Paid", "amount"],
        "issue": ["Issue", "Problem", "Complaint", "issue"],
        "category": ["Category", "Type", "category"],
    },
    "zh": {
        "name": ["姓名", "客户", "买家", "联系人"],
        "order": ["订单号", "订单", "单号", "编号"],
        "product": ["商品", "产品", "物品"],
        "city": ["城市", "地区", "所在地"],
        "date": ["日期", "时间", "购买日期"],
        "amount": ["金额", "价格", "付款"],
        "issue": ["问题", "情况", "说明"],
        "category": ["类别", "类型"],
    },
}

SMALL_TALK: dict[str, list[str]] = {
    "en": [
        "Hello.", "Hi there!", "Thank you.", "Please help.", "What can you do?", "I am not happy.", "Please reply soon.",
        "I want a refund.", "Can you check this?", "Nobody has told me what the reason is.", "We are sorry.",
        "This is not the first time.", "A new one, please.",
        "After all these days.", "Again and again.", "Because of this I write.", "Before I forget.", "But why?", "Do you know?",
        "Does it matter?", "Every day I wait.", "First of all, hello.", "Great service it was not.",
        "How can this be?", "However, I stay polite.", "If possible, be quick.", "Is anyone there?", "Just so you know.",
        "Kindly check.", "Last week I called.", "Let us see.", "Look at this.", "Maybe you can help.", "Never again.",
        "Next time I buy elsewhere.", "No reply so far.", "Now I am waiting.", "Oh no!", "Once more.", "Only one question.",
        "Our family is angry.", "Should I call?", "So sad.", "Some more details.", "Still nothing.",
        "Tell me more.", "That is all.", "Then I called.", "There is more.", "They did not answer.", "Today I write again.",
        "Very bad.", "Well then.", "What now?", "Where is it?", "Who is responsible?", "Will you help?",
        "With thanks.", "Would you check?", "Yes, again.", "Your friend.", "As I said.", "At last.", "Any news?",
    ],
    "zh": [
        "你好。", "您好!", "谢谢。", "请尽快处理。", "怎么办?", "我很不满意。", "请回复我。", "我要退款。", "请查一下。", "没有人告诉我原因是什么。",
        "客服没有提到这件事。", "这不是第一次了。", "请换一个新的。",
        "再说一次。", "我等了很久。", "真的很着急!", "有人在吗?", "还是没有消息。", "麻烦看一下。", "这是怎么回事?", "下次不买了。", "多谢。", "如题。",
        "请帮忙。", "以上就是情况。", "家里人都很生气。", "昨天打过电话。", "希望早点解决。", "不知道该找谁。",
    ],
}

# Words without a field, put between values at random: from such text a reader can only learn what a name, an order id,
# a city or a price looks like, not what stands before it. That is what carries over to phrasings never seen.
FILLERS: dict[str, list[str]] = {
    "en": (  # noqa: SIM905
        "able about above accept account across act add address afraid after afternoon again agent agree all almost alone "
        "along already also always am amazing among amount an and angry annoying another answer any anyone anything "
        "anywhere apart apologise apology appear apply appreciate are area around arrange arrive article as aside asked "
        "asking assist assume at attached attention available avoid aware away awful back bad basic be became because "
        "become been before begin behind being believe belong below beside best better between beyond bill both bother "
        "bottom bought box branch bring broken brother brought build business busy but button buy buyer by call calm came "
        "can care careful carry case cause cent centre certain chance change charge charged charges chat cheap checked "
        "cheers child choose claim clear client close collect come comes coming comment common company compare complain "
        "complained complaining complaint complete concern confirm confused consider contact contacted continue copy "
        "correct cost costs could count counter country couple courier course cover credit current customer damage data "
        "dated dates daughter deal dear decide deep deliver delivered delivery depend describe desk detail details did "
        "different difficult direct disappointed discount discuss distance do does doing done door doubt down draft drop "
        "due during duty each earlier early easily east easy effort either else email empty end enough enter entire entry "
        "envelope error especially even evening ever every evidence exactly example except exchange excuse expect "
        "expected expensive experience explain extra eye face fact fail fair faithfully false family far fast father "
        "fault fee feel felt few fifth file filed fill final finally find fine finish first five fix flat floor folks "
        "follow following follows food for force forget form former forward found four free frequent fresh friend from "
        "full fully furious further future gave general gentle get given giving glad goes going gone good goods got gram "
        "great greetings ground group guarantee guess guest had half hand handed handle happen happened happy hard hardly "
        "has hate have having he hear heard heavy held help her here hers hidden him his hold holding holiday home honest "
        "hope hoped hour house how however hurry husband i idea if ignore ill imagine immediate important in include "
        "included indeed inform information inside instead intend interest into invoice involved issue it item its itself "
        "job join joy judge just keeps kept kind kindly knew know knows label lack lady language large last late lately "
        "later lead leading learn leave leaving left legal lend less let letter level lie lies lifted light like likely "
        "line listed listen little live lived lives living loads local long look lost lot lots loud love low luck lucky "
        "machine made mail main major make makes making man manage manager many mark matter maybe me mean means meant "
        "meanwhile meet member mention mentioned mere message middle mind mine minute miss missing mistake moment money "
        "month months more moreover morning most mother move moved much multiple must my myself name named national "
        "naturally near nearly need neighbour neither never nevertheless new news next nice night nine no nobody none "
        "nonetheless normal normally north not note nothing notice now nowhere number observe obtain obvious occur odd of "
        "off offer offered office often okay old on once one online only open opened opinion option or ordinary original "
        "originally other others otherwise ought our ourselves out outside over overall owed own owner pack package "
        "packed page paid pair paper parcel part partly passed past patience pay paying payment people perfect perhaps "
        "period permit person phone phoned photo pick picked picture piece place placed plain plan play please pleased "
        "plus point polite poor popular position possible post posted pound practice prefer prepare present pretty "
        "previous price print private probably process promise promised proof proper properly prove provide public pull "
        "purchase purchased pure purpose push put quality question queue quick quietly quite quote raised ran rang rate "
        "rather reach read reading ready real reality really reason reasonable receipt receive received recent recently "
        "recommend record refer reference refund refuse refuses regarding regards regret regular relate remain remember "
        "remind repair repeat repeated replace replaced replied reply report reported reporting represent request "
        "requested require rest return returned returning review right rude rule sad said sale sales salesman same "
        "satisfied save saw say saying says school second section see seem seems seen select sell seller send sender "
        "sending sense sent separate serious serve service set settle seven several shall shame share she sheet shift "
        "shipped shipping shock shop short shortly should show shows sign signed silent similar simple simply since "
        "sincere sincerely single sister site six size skip slow small so sold solution solve some somebody someone "
        "somewhere son soon sooner sorry sort sought sound south speak speaking special specific spend spent spoke staff "
        "stand standard start started state stated states station stay step still stop stopped stopping store story "
        "straight strange street strong stuck subject submit successful such suddenly suggest sum supply support suppose "
        "supposed sure surely surprise system table take taken takes taking talk talked task team telephone tell telling "
        "ten terms terrible test than thank thanked thanks that their theirs them then there therefore these they thing "
        "things think third thirty this those though thought three throughout thus ticket till time times tired to today "
        "together token told tomorrow too took top total totally toward town track tracking trial trouble truck true "
        "trust truth try trying turn turned twelve twenty twice two type typed unable unacceptable under understand "
        "unfortunately unhappy unit unless unlike unpaid unpleasant unpleased until up upset urgent urgently us use used "
        "useful useless user usual usually value various version very via view visit visited voice void volume voucher "
        "wait waited waiting waits walk wall want wanted wants warehouse warranty was wasted watch way we wearing website "
        "week weekend welcome well went were west what whatever when whenever where whereas wherever whether which while "
        "who whoever whole whom why wife will window wish wishes with without woman wonder wonderful wondering word "
        "wording work worked working works world worried worry worse worst worth would wrapped write writer writes "
        "writing written wrong wrote yard year years yellow yes yesterday yet you young your yours zero"
    ).split(),
    "zh": (  # noqa: SIM905
        "的 了 是 在 有 和 就 都 还 把 被 对 到 给 从 向 跟 为 以 及 或 但 因为 所以 如果 虽然 但是 而且 然后 于是 已经 现在 今天 昨天 之前 之后 "
        "这个 那个 这里 那里 我们 你们 他们 大家 自己 别人 有人 本人 先生 女士 同事 用户 客户 顾客 买家 店里 公司 门店 仓库 快递 物流 邮件 电话 短信 "
        "记录 登记 查看 核对 处理 联系 通知 回复 等待 收到 发出 寄出 送达 购买 下单 付款 支付 花费 价格 总共 合计 大约 编号 号码 单号 地址 地区 住在 "
        "位于 来自 送往 发往 关于 请问 麻烦 希望 觉得 认为 表示 告诉 说明 称 说 问 答 写道 提交 反馈 投诉 建议 要求 申请 退回 更换 补发 原因 情况 事情 "
        "问题 结果 时候 日期 时间 当天 当时 最近 终于 仍然 一直 再次 又 也 很 太 真 不 没 别 请 谢谢 您好 此致 敬礼 附上 如下 以上 其中 另外 同时 竟然 可是"
    ).split(),
}

UNSEEN: dict[str, list[str]] = {
    "en": [
        "Since {date} I have been waiting for an answer about {order}: my {product} {issue}. Regards from {city}, {name} ({amount} yuan).",
        "Complaint no. {order}, filed by {name} who lives in {city}: the {product}, purchased {date} at {amount} yuan, {issue}.",
        "{amount} yuan is a lot of money for a {product} that {issue}! {name} here, from {city}, order {order}, {date}.",
        "Call note. {name}, {city}. Says the {product} {issue}. Invoice {order}, {date}, {amount} yuan.",
        "Could someone look into {order}? The {product} {issue}, though {name} in {city} paid {amount} yuan for it on {date}.",
        "Good morning, {city} calling, my name is {name}. You charged me {amount} yuan on {date}; the {product} of order {order} {issue}.",
        "For the record: on {date} a {product} left for {city}, addressed to {name}, order {order}, worth {amount} yuan. It {issue}.",
        "Refund wanted ({amount} yuan). The {product} {issue}. Order {order} dates from {date}. Best wishes, {name} / {city}.",
    ],
    "zh": [
        "自{date}起我一直在等{order}的答复:{product}{issue}。{city}{name}敬上({amount}元)。",
        "投诉编号{order},投诉人{name},家住{city}:{date}以{amount}元购得的{product}{issue}。",
        "{amount}元可不便宜,这{product}居然{issue}!我是{name},{city}人,订单{order},{date}。",
        "通话记录:{name},{city}。称{product}{issue}。发票{order},{date},{amount}元。",
        "谁能看看{order}?{product}{issue},{city}的{name}{date}可是付过{amount}元的。",
        "早上好,这里是{city},本人{name}。你们{date}收了我{amount}元,订单{order}的{product}却{issue}。",
        "备忘:{date}发往{city}的{product},收件人{name},订单{order},价值{amount}元,{issue}。",
        "申请退款({amount}元)。{product}{issue}。订单{order}的日期是{date}。祝好,{name}/{city}。",
    ],
}
