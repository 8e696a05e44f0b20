// The samples of a sweep: a prompt is chosen, a slider moves through λ, and a token shows what each branch would have said.
// Texts reach the page as text alone (textContent), never as HTML.

(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const number = (value, digits = 3) => (value === null ? "–" : value.toFixed(digits).replace("-", "−"));
  const short = (value) => number(value, Math.abs(value) < 10 ? 3 : Math.abs(value) < 100 ? 1 : 0);
  // λ is a number, null in an arm without one; of several adapters a text, as "helpful=0.7,harmless=0.3"
  const lam = (value) => (value === null ? "–" : String(value).replaceAll("-", "−").replaceAll(",", ", "));
  const strengthOf = (value) => (typeof value === "string" ? lam(value) : `λ = ${lam(value)}`);
  const valuesOf = (value) => (typeof value === "string" ? value.split(",").map((part) => lam(part.split("=").pop())) : [lam(value)]);
  const most = Math.log(Math.max(2, data.branches.length)); // of a Jensen-Shannon divergence, nats
  const depth = (js) => Math.min(1, Math.sqrt(Math.max(0, js) / most)).toFixed(3);

  const element = (name, className, ...content) => {
    const made = document.createElement(name);
    if (className) made.className = className;
    made.append(...content);
    return made;
  };

  // What a browser would obey, or not show, as a mark: controls, and characters that turn the direction of text.
  const UNSEEN = /[\u0000-\u0009\u000b-\u001f\u007f-\u009f\u200b\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]/;
  const mark = (character) => {
    const code = character.charCodeAt(0);
    if (code === 9) return "⇥\t";
    if (code < 32) return String.fromCharCode(0x2400 + code);
    return `U+${code.toString(16).toUpperCase().padStart(4, "0")}`;
  };
  const seen = (text) => Array.from(text, (c) => (UNSEEN.test(c) ? mark(c) : c)).join("");
  const written = (text) => {
    const parts = document.createDocumentFragment();
    for (const piece of text.split(/(\n|[^\P{C}\n\u200c-\u200f\u{e0020}-\u{e007f}])/u)) {
      if (piece === "\n") parts.append(element("span", "unseen", "↵"), "\n");
      else if (piece.length === 1 && UNSEEN.test(piece)) parts.append(element("span", "unseen", mark(piece)));
      else parts.append(piece);
    }
    return parts;
  };
  const quoted = (text) => (text === "" ? "(part of a character)" : seen(text).replaceAll("\n", "↵"));

  // ---- what is shown

  let pair = data.pairs[0]; // as it is listed
  let content = null; // its prompt, texts and rows
  let arm = data.arms[0];
  let place = 0; // of the slider, among the arm's λ
  let fixed = [data.arms[0], 0]; // arm and place of the pane beside
  let held = null; // the token that was clicked

  async function unpack(packed) {
    const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Response(stream).json();
  }

  const rowAt = (of, at) => (content.rows[of.arm] || []).find((row) => row.lambda === of.lambdas[at]);
  const nameOf = (of, at) => {
    const strength = of.lambdas[at] === null ? [] : [strengthOf(of.lambdas[at])];
    return [...strength, ...(data.arms.length > 1 ? [of.name] : [])].join(" · ");
  };
  const [bestArm, bestLambda] = data.recommended || [null, null];
  const isBest = (of, value) => of.arm === bestArm && value === bestLambda;
  const firstReward = () => Object.keys(content.rows[arm.arm] ? content.rows[arm.arm][0].rewards : {})[0];

  async function showPair() {
    const wanted = pair;
    const unpacked = await unpack(wanted.packed);
    if (pair !== wanted) return; // another one was chosen meanwhile
    content = unpacked;
    byId("pair").value = String(data.pairs.indexOf(pair));
    byId("previous").disabled = pair === data.pairs[0];
    byId("next").disabled = pair === data.pairs[data.pairs.length - 1];
    byId("prompt").replaceChildren(
      ...content.prompt.map(([role, text]) => {
        const turn = element("div", "turn", ...(role ? [element("span", "role", seen(role))] : []), written(text));
        turn.dir = "auto";
        return turn;
      }),
    );
    showTicks();
    showPane("fixed", ...fixed);
    showMoving();
    byId("viewer").hidden = false;
  }

  function showTicks() {
    const last = arm.lambdas.length - 1;
    const first = firstReward();
    byId("ticks-of").textContent = first && last < 16 ? `below each λ: ${seen(first)} of this sample` : "";
    byId("ticks").style.height = `${1.3 * (valuesOf(arm.lambdas[0]).length + 1)}em`;
    const every = Math.ceil(arm.lambdas.length / (window.innerWidth < 600 ? 8 : 16));
    byId("ticks").replaceChildren(
      ...arm.lambdas.flatMap((value, at) => {
        if (at % every && at !== place && !isBest(arm, value)) return [];
        const row = rowAt(arm, at);
        const reward = row && row.rewards[first];
        const star = isBest(arm, value) ? "★" : "";
        const tick = element("span", at === place ? "now" : "", `${valuesOf(value).join("\n")}${star}`);
        if (typeof reward === "number" && last < 16) tick.append(`\n${short(reward)}`);
        tick.style.left = `${last ? (100 * at) / last : 50}%`;
        tick.addEventListener("click", () => moveTo(at));
        return [tick];
      }),
    );
  }

  function showMoving() {
    byId("strength").textContent = valuesOf(arm.lambdas[place]).join(", ");
    const [first, row] = [firstReward(), rowAt(arm, place)];
    const reward = first && row ? `, ${seen(first)} ${short(row.rewards[first])}` : "";
    byId("lambda").setAttribute("aria-valuetext", nameOf(arm, place) + reward);
    byId("moving-name").textContent = nameOf(arm, place);
    showPane("moving", arm, place);
  }

  function showPane(pane, of, at) {
    const row = rowAt(of, at);
    const text = byId(`${pane}-text`);
    byId(`${pane}-link`).href = linkTo(of, at);
    byId(`${pane}-figures`).replaceChildren(...(row ? figuresOf(row) : []));
    if (held && text.contains(held)) hold(null);
    text.replaceChildren(!row ? "not sampled" : row.token_views ? tokens(row.token_views, row.token_lambda) : written(row.text));
    const first = text.querySelector(".token");
    if (first) first.tabIndex = 0;
  }

  function figuresOf(row) {
    const rewards = Object.entries(row.rewards).map(([name, value]) => `${seen(name)} ${short(value)}`);
    const outcome = { 1: "wins", 0: "ties", "-1": "loses" };
    const judged = Object.entries(row.judged).map(
      ([against, verdict]) => `judge: ${verdict === null ? "no verdict" : outcome[verdict]} against λ=${lam(against)}`,
    );
    const how = row.finish_reason === "length" ? "cut at the limit" : "ended";
    const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
    const strength = row.token_lambda ? [`λ of its tokens: mean ${number(mean(row.token_lambda), 2)}`] : [];
    const all = [...rewards, `KL ${number(row.kl, 2)} nats`, ...strength, ...judged, `${row.num_tokens} tokens, ${how}`];
    const errors = Object.entries(row.errors).map(([name, message]) =>
      element("span", "error", ` · ${seen(name)} failed: ${seen(message)}`),
    );
    return [all.join(" · "), ...errors];
  }

  // ---- tokens

  // strengths: the λ that a rule or a schedule gave each token, if one did
  function tokens(views, strengths) {
    const parts = document.createDocumentFragment();
    for (const [at, view] of views.entries()) {
      const token = element("span", "token");
      const text = content.texts[view[0]];
      token.append(text === "" ? element("span", "unseen", "·") : written(text));
      token.style.setProperty("--depth", depth(view[1]));
      token.tabIndex = -1;
      token.setAttribute("role", "button");
      token.setAttribute("aria-pressed", "false");
      token.strength = strengths ? `, decoded at λ = ${number(strengths[at])}` : "";
      token.setAttribute("aria-label", `${quoted(text)}: disagreement ${number(view[1])} nats${token.strength}`);
      token.view = view;
      parts.append(token);
    }
    return parts;
  }

  function showDetail(token) {
    const [text, js, ...rest] = token.view;
    const width = rest.length / data.branches.length;
    const branches = data.branches.map((branch, at) => {
      const items = [];
      for (let n = at * width; n < (at + 1) * width; n += 2) {
        const said = element("span", "said", quoted(content.texts[rest[n]]));
        said.title = said.textContent;
        const bar = element("span", "bar");
        bar.style.width = `${100 * rest[n + 1]}%`;
        const chance = element("span", "chance", `${(100 * rest[n + 1]).toFixed(1)} %`);
        items.push(element("li", rest[n] === text ? "taken" : "", said, element("span", "", bar), chance));
        items[items.length - 1].children[1].setAttribute("aria-hidden", "true");
      }
      return element("section", "", element("h4", "", `${seen(branch)} would say`), element("ol", "", ...items));
    });
    const shown = element("b", "", quoted(content.texts[text]));
    shown.style.setProperty("--depth", depth(js));
    const of = element("p", "of", shown, ` disagreement ${number(js)} of at most ${number(most)} nats${token.strength}`);
    byId("detail").replaceChildren(of, element("div", "branches", ...branches));
  }

  // Beside the texts where there is room; on a narrow screen in the text, below the token.
  const narrow = matchMedia("(max-width: 64rem)");
  function placeDetail() {
    const detail = byId("detail");
    if (narrow.matches && held) held.after(detail);
    else byId("side").append(detail);
  }

  function hold(token) {
    if (held) {
      held.classList.remove("held");
      held.setAttribute("aria-pressed", "false");
    }
    held = token;
    if (token) {
      token.classList.add("held");
      token.setAttribute("aria-pressed", "true");
      showDetail(token);
    }
    placeDetail();
  }

  function listenToTokens(text) {
    const tokenOf = (event) => event.target.closest(".token");
    const show = (event) => {
      const token = tokenOf(event);
      if (token && !held && !narrow.matches) showDetail(token);
    };
    text.addEventListener("mouseover", show);
    text.addEventListener("focusin", show);
    text.addEventListener("click", (event) => {
      const token = tokenOf(event);
      if (token) hold(token === held ? null : token);
    });
    text.addEventListener("keydown", (event) => {
      const token = tokenOf(event);
      if (!token) return;
      const all = Array.from(text.querySelectorAll(".token"));
      const at = all.indexOf(token);
      const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[event.key];
      if (event.key === "Enter" || event.key === " ") hold(token === held ? null : token);
      else if (event.key === "Escape") hold(null);
      else if (to === undefined) return;
      else if (all[to]) {
        token.tabIndex = -1;
        all[to].tabIndex = 0;
        all[to].focus();
      }
      event.preventDefault();
    });
  }

  // ---- controls

  function moveTo(at) {
    place = at;
    byId("lambda").value = String(at);
    showTicks();
    showMoving();
  }

  function chooseArm(index) {
    const before = arm.lambdas[place];
    arm = data.arms[index];
    place = nearest(arm, before);
    limitSlider();
    showTicks();
    showMoving();
  }

  function limitSlider() {
    byId("lambda").max = String(arm.lambdas.length - 1);
    byId("lambda").disabled = arm.lambdas.length === 1;
    byId("lambda").value = String(place);
  }

  function nearest(of, value) {
    if (of.lambdas.includes(value)) return of.lambdas.indexOf(value);
    if (of.lambdas.some((other) => typeof other === "string")) {
      return Math.max(0, value === 0 ? of.lambdas.findIndex((other) => valuesOf(other).every((each) => Number(each) === 0)) : 0);
    }
    const distance = of.lambdas.map((other) => Math.abs(other - value));
    return distance.indexOf(Math.min(...distance));
  }

  function step(by) {
    const to = data.pairs[data.pairs.indexOf(pair) + by];
    if (!to) return;
    pair = to;
    showPair();
  }

  // ---- links to a row

  function linkTo(of, at) {
    const arms = data.arms.length > 1 ? { arm: of.arm } : {};
    const strength = of.lambdas[at] === null ? {} : { lambda: of.lambdas[at] };
    return `#${new URLSearchParams({ prompt: pair.index, sample: pair.sample, ...strength, ...arms })}`;
  }

  // Shows the row that a link names, by the numbers in samples.jsonl; says so where it is not there.
  async function follow(link) {
    const wanted = new URLSearchParams(link.slice(1));
    if (!wanted.has("prompt")) return;
    const [index, sample] = [Number(wanted.get("prompt")), Number(wanted.get("sample") || 0)];
    const found = data.pairs.find((other) => other.index === index && other.sample === sample);
    const of = wanted.has("arm") ? data.arms.find((other) => other.arm === wanted.get("arm")) : data.arms[0];
    const strength = wanted.get("lambda");
    const isOne = (value) => (value === null ? strength === null : typeof value === "string" ? value === strength : value === Number(strength));
    const at = !of ? -1 : strength === null ? 0 : of.lambdas.findIndex(isOne);
    const named = `prompt ${index}, sample ${sample}${strength === null ? "" : `, λ = ${lam(strength)}`}`;
    byId("missing").hidden = Boolean(found) && at >= 0;
    if (!byId("missing").hidden) {
      byId("missing").textContent = found
        ? `There is no row of ${named}${wanted.has("arm") ? `, arm ${seen(wanted.get("arm"))}` : ""}: it was not decoded.`
        : `This page has no row of ${named}. If it was decoded, it is in samples.jsonl (prompt_index ${index}, sample ${sample}).`;
      byId("missing").scrollIntoView({ block: "center" });
      return;
    }
    pair = found;
    byId("arm").value = String(data.arms.indexOf(of));
    arm = of;
    place = at;
    limitSlider();
    await showPair();
    byId("viewer").scrollIntoView();
    byId("moving-text").focus({ preventScroll: true });
  }

  function option(text, value) {
    const made = element("option", "", text);
    made.value = String(value);
    return made;
  }

  async function start() {
    const several = data.pairs.some((other) => other.sample > 0);
    byId("pair").append(
      ...data.pairs.map((other, at) => {
        const head = `prompt ${other.index}${several ? `, sample ${other.sample}` : ""}: `;
        return option(head + quoted(other.head), at);
      }),
    );
    byId("pair").addEventListener("change", (event) => {
      pair = data.pairs[Number(event.target.value)];
      showPair();
    });
    byId("previous").addEventListener("click", () => step(-1));
    byId("next").addEventListener("click", () => step(1));

    byId("arm").append(...data.arms.map((of, at) => option(of.name, at)));
    byId("arm-label").hidden = data.arms.length === 1;
    byId("arm").addEventListener("change", (event) => chooseArm(Number(event.target.value)));
    byId("lambda").addEventListener("input", (event) => moveTo(Number(event.target.value)));

    const stops = data.arms.flatMap((of) => of.lambdas.map((_, at) => [of, at]));
    byId("fixed").append(...stops.map((stop, at) => option(nameOf(...stop), at)));
    byId("fixed").addEventListener("change", (event) => {
      fixed = stops[Number(event.target.value)];
      showPane("fixed", ...fixed);
    });
    fixed = [arm, nearest(arm, 0)];
    byId("fixed").value = String(fixed[1]);
    for (const link of document.querySelectorAll(".row-link")) {
      link.addEventListener("click", () => copyText(link.href, link, () => {}));
    }

    if (byId("detail")) {
      byId("scale").append(
        element("i", ""),
        ...[0, 0.01, 0.1, 0.3, most].map((js) => {
          const label = element("span", "", js === most ? (data.branches.length > 2 ? number(most) : "ln 2") : String(js));
          label.style.left = `${100 * depth(js)}%`;
          return label;
        }),
      );
      listenToTokens(byId("fixed-text"));
      listenToTokens(byId("moving-text"));
      document.addEventListener("keydown", (event) => event.key === "Escape" && hold(null));
      narrow.addEventListener("change", placeDetail);
    }
    const best = Math.max(0, data.arms.findIndex((of) => of.arm === bestArm));
    byId("arm").value = String(best);
    arm = data.arms[best];
    place = nearest(arm, bestArm === null ? 1 : bestLambda);
    limitSlider();
    await showPair();
    window.addEventListener("resize", showTicks);
    window.addEventListener("hashchange", () => follow(location.hash));
    await follow(location.hash);
    document.documentElement.dataset.ready = ""; // all is shown
  }

  if (typeof DecompressionStream === "undefined") {
    byId("missing").textContent = "This browser is too old to show the samples: they are compressed. They are in samples.jsonl.";
    byId("missing").hidden = false;
  } else if (data.pairs.length) start();
})();
