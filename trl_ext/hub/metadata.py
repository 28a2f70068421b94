"""Metadata of cards that the Hub refuses unless it knows them, licences and languages, checked before the upload."""

import difflib
import re


# The Hub's list on 2026-08-22: https://huggingface.co/docs/hub/repositories-licenses
LICENCES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0
artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0
cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0
cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0
epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research
intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openmdw-1.1 openrail++ osl-3.0
postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3
llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown other
""".split()
LICENCE_PAGE = "https://huggingface.co/docs/hub/repositories-licenses"
# Words that people write for the parts of an identifier
LICENCE_WORDS = {
    r"\b(the|licen[cs]e|version|public|only|or later|international|universal|deed|gnu)\b": " ",
    r"\bcreative commons\b": "cc",
    r"\bcc ?(0|zero)( v?1\.0)?\b": "cc0-1.0",
    r"\battribution\b": "by",
    r"\bnon ?commercial\b": "nc",
    r"\bshare ?alike\b": "sa",
    r"\bno ?deriv(ative)?s?\b": "nd",
    r"\baffero general\b": "agpl",
    r"\blesser general\b": "lgpl",
    r"\bgeneral\b": "gpl",
    r"\bmozilla\b": "mpl",
    r"(\b|(?<=pl))v(?=\d)": "",
}

# ISO 639-1, by the names of ISO 639-3; `bh` is withdrawn, but taken by the Hub
LANGUAGES = dict(
    entry.split(":")
    for entry in """
aa:Afar;ab:Abkhazian;ae:Avestan;af:Afrikaans;ak:Akan;am:Amharic;an:Aragonese;ar:Arabic;as:Assamese;av:Avaric;ay:Aymara;
az:Azerbaijani;ba:Bashkir;be:Belarusian;bg:Bulgarian;bh:Bihari;bi:Bislama;bm:Bambara;bn:Bengali;bo:Tibetan;br:Breton;
bs:Bosnian;ca:Catalan;ce:Chechen;ch:Chamorro;co:Corsican;cr:Cree;cs:Czech;cu:Church Slavic;cv:Chuvash;cy:Welsh;
da:Danish;de:German;dv:Divehi;dz:Dzongkha;ee:Ewe;el:Greek;en:English;eo:Esperanto;es:Spanish;et:Estonian;eu:Basque;
fa:Persian;ff:Fulah;fi:Finnish;fj:Fijian;fo:Faroese;fr:French;fy:Western Frisian;ga:Irish;gd:Scottish Gaelic;
gl:Galician;gn:Guarani;gu:Gujarati;gv:Manx;ha:Hausa;he:Hebrew;hi:Hindi;ho:Hiri Motu;hr:Croatian;ht:Haitian;
hu:Hungarian;hy:Armenian;hz:Herero;ia:Interlingua;id:Indonesian;ie:Interlingue;ig:Igbo;ii:Sichuan Yi;ik:Inupiaq;io:Ido;
is:Icelandic;it:Italian;iu:Inuktitut;ja:Japanese;jv:Javanese;ka:Georgian;kg:Kongo;ki:Kikuyu;kj:Kuanyama;kk:Kazakh;
kl:Kalaallisut;km:Khmer;kn:Kannada;ko:Korean;kr:Kanuri;ks:Kashmiri;ku:Kurdish;kv:Komi;kw:Cornish;ky:Kirghiz;la:Latin;
lb:Luxembourgish;lg:Ganda;li:Limburgan;ln:Lingala;lo:Lao;lt:Lithuanian;lu:Luba-Katanga;lv:Latvian;mg:Malagasy;
mh:Marshallese;mi:Maori;mk:Macedonian;ml:Malayalam;mn:Mongolian;mr:Marathi;ms:Malay;mt:Maltese;my:Burmese;na:Nauru;
nb:Norwegian Bokmål;nd:North Ndebele;ne:Nepali;ng:Ndonga;nl:Dutch;nn:Norwegian Nynorsk;no:Norwegian;nr:South Ndebele;
nv:Navajo;ny:Chichewa;oc:Occitan;oj:Ojibwa;om:Oromo;or:Oriya;os:Ossetian;pa:Panjabi;pi:Pali;pl:Polish;ps:Pushto;
pt:Portuguese;qu:Quechua;rm:Romansh;rn:Rundi;ro:Romanian;ru:Russian;rw:Kinyarwanda;sa:Sanskrit;sc:Sardinian;sd:Sindhi;
se:Northern Sami;sg:Sango;sh:Serbo-Croatian;si:Sinhala;sk:Slovak;sl:Slovenian;sm:Samoan;sn:Shona;so:Somali;sq:Albanian;
sr:Serbian;ss:Swati;st:Southern Sotho;su:Sundanese;sv:Swedish;sw:Swahili;ta:Tamil;te:Telugu;tg:Tajik;th:Thai;
ti:Tigrinya;tk:Turkmen;tl:Tagalog;tn:Tswana;to:Tonga;tr:Turkish;ts:Tsonga;tt:Tatar;tw:Twi;ty:Tahitian;ug:Uighur;
uk:Ukrainian;ur:Urdu;uz:Uzbek;ve:Venda;vi:Vietnamese;vo:Volapük;wa:Walloon;wo:Wolof;xh:Xhosa;yi:Yiddish;yo:Yoruba;
za:Zhuang;zh:Chinese;zu:Zulu
""".replace("\n", "").split(";")
)
NO_LANGUAGES = ("code", "multilingual")  # the Hub takes these in place of a language


def check_licence(licence: str | list[str], name: str | None, argument: str, name_argument: str) -> None:
    """
    Refuses a licence that the Hub would refuse in a card.

    Args:
        licence (`str` or `list[str]`): Identifier of the licence, or those of several.
        name (`str`, *optional*): Name of an `"other"` licence.
        argument, name_argument (`str`): Names of the two in messages.

    Raises:
        ValueError: with the identifier that may have been meant.
    """
    for identifier in [licence] if isinstance(licence, str) else licence:
        if identifier not in LICENCES:
            known = _similar_licence(identifier)
            meant = f"Write {known!r} if you mean that one. " if known else ""
            raise ValueError(
                f"`{argument}` takes the Hub's identifiers of licences, and {identifier!r} is none. {meant}They are "
                f"listed on {LICENCE_PAGE}; one that is not there is {argument}='other' with `{name_argument}`."
            )
        if identifier == "other" and not (name and name.strip()):
            raise ValueError(
                f"{argument}='other' says nothing without `{name_argument}`, e.g. 'my-licence-1.0'. The identifiers of "
                f"known licences are listed on {LICENCE_PAGE}."
            )


def _similar_licence(written: str) -> str | None:
    """Returns the identifier that comes near a licence's usual spelling or name, or None."""
    text = re.sub(r"[^a-z0-9.+]+", " ", written.lower())
    for pattern, replacement in LICENCE_WORDS.items():
        text = re.sub(pattern, replacement, text)
    squeezed = {re.sub(r"[^a-z0-9]", "", identifier): identifier for identifier in LICENCES}
    found = difflib.get_close_matches(re.sub(r"[^a-z0-9]", "", text), squeezed, n=1, cutoff=0.75)
    return squeezed[found[0]] if found else None


def check_language(language: str | list[str]) -> None:
    """
    Refuses languages that the Hub would refuse in a card.

    Args:
        language (`str` or `list[str]`): Codes of two letters (ISO 639-1) or, unchecked beyond that, of three (ISO 639-2
            and 639-3), or one of [`NO_LANGUAGES`].

    Raises:
        ValueError: with the code that may have been meant.
    """
    for code in [language] if isinstance(language, str) else language:
        is_known = isinstance(code, str) and (code in LANGUAGES or code in NO_LANGUAGES)
        if not is_known and not re.fullmatch("[a-z]{3}", str(code)):
            known = _similar_language(str(code))
            meant = f" Write {known!r} for {LANGUAGES[known]}." if known else ""
            raise ValueError(
                f"`language` takes codes of ISO 639 in lower case, such as 'en', and 'multilingual' and 'code' beside "
                f"them, and {code!r} is none.{meant} A country has no place in it."
            )


def _similar_language(written: str) -> str | None:
    """Returns the code of a language that was written with a country, in capitals or by its name, or None."""
    code = re.split("[-_]", written.strip().lower())[0]
    if code in LANGUAGES:
        return code
    codes = {name.lower(): code for code, name in LANGUAGES.items()}
    found = difflib.get_close_matches(code, codes, n=1, cutoff=0.9)
    return codes[found[0]] if found else None
