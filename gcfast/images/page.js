// Linked places: point at a place of one picture, and the other shows where it answers.
const byte = (text) => Int8Array.from(atob(text), (c) => c.charCodeAt(0));
const smooth = (heat) => 0.8 * (1 - (1 - heat) ** 2); // as the overlays are laid on

function color(heat) {
  const at = heat * (SCALE.length - 1), low = Math.floor(at), part = at - low;
  const high = Math.min(low + 1, SCALE.length - 1);
  return SCALE[low].map((value, i) => value + (SCALE[high][i] - value) * part);
}

function link(row) {
  const { table, grids, shares } = JSON.parse(row.dataset.linked);
  const values = byte(table);
  const sides = [...row.querySelectorAll("figure[data-side]")].map((figure, side) => {
    const [height, width] = grids[side];
    const canvas = document.createElement("canvas"), frame = document.createElement("i");
    [canvas.width, canvas.height] = [width, height];
    canvas.style.width = `${100 * shares[side][1]}%`;
    canvas.style.height = `${100 * shares[side][0]}%`;
    figure.querySelector("span").append(canvas, frame);
    return { figure, canvas, frame, height, width, share: shares[side], place: null };
  });
  const [one, two] = sides;
  const count = [one, two].map((side) => side.height * side.width);

  function point(side, y, x) {
    const self = sides[side], other = sides[1 - side], place = y * self.width + x;
    self.place = [y, x];
    const answers = Array.from({ length: count[1 - side] }, (_, i) =>
      Math.max(0, side ? values[i * count[1] + place] : values[place * count[1] + i]));
    const most = Math.max(...answers, 1);
    const image = other.canvas.getContext("2d").createImageData(other.width, other.height);
    answers.forEach((value, i) => {
      const heat = value / most;
      image.data.set([...color(heat), 255 * smooth(heat)], 4 * i);
    });
    other.canvas.getContext("2d").putImageData(image, 0, 0);
    Object.assign(self.frame.style, {
      left: `${(100 * self.share[1] * x) / self.width}%`,
      top: `${(100 * self.share[0] * y) / self.height}%`,
      width: `${(100 * self.share[1]) / self.width}%`,
      height: `${(100 * self.share[0]) / self.height}%`,
    });
    self.figure.className = "from";
    other.figure.className = "to";
  }

  function clear() {
    sides.forEach(({ figure }) => (figure.className = ""));
  }

  sides.forEach((self, side) => {
    const inside = (value, size) => Math.min(size - 1, Math.max(0, Math.floor(value)));
    self.figure.tabIndex = 0;
    self.figure.addEventListener("pointermove", (event) => {
      const box = self.figure.querySelector("img").getBoundingClientRect();
      const y = (event.clientY - box.top) / box.height / self.share[0];
      const x = (event.clientX - box.left) / box.width / self.share[1];
      point(side, inside(y * self.height, self.height), inside(x * self.width, self.width));
    });
    self.figure.addEventListener("pointerleave", clear);
    self.figure.addEventListener("blur", clear);
    self.figure.addEventListener("keydown", (event) => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
      if (!(event.key in step)) return;
      event.preventDefault();
      const [y, x] = self.place ?? [self.height >> 1, self.width >> 1];
      const [down, right] = step[event.key];
      point(side, inside(y + down, self.height), inside(x + right, self.width));
    });
  });
}

document.querySelectorAll("[data-linked]").forEach(link);
