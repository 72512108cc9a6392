"""Groups of ImageNet classes, for pictures in which no single class is likely enough.

If, for example, three breeds of cat share the probability, the picture is still surely one of a
cat. Class numbers count from 0, and ranges include both ends. All numbers were checked against
`imagenet_labels.txt`.
"""

GROUPS = {
    "dog": "151-268",
    "wild dog or fox": "269-280",
    "cat": "281-285",
    "big cat": "286-293",
    "bear": "294-297 388",
    "elephant": "101 385 386",
    "primate": "365-384",
    "hoofed animal": "339-355",
    "other mammal": "298 299 330-338 356-364 387",
    "bird": "7-24 80-100 127-146",
    "fish": "0-6 389-397",
    "reptile or amphibian": "25-68",
    "insect or spider": "70-79 300-326",
    "marine animal": "107-109 117-126 147-150 327-329",
    "vehicle": "407 408 436 444 450 466 468 511 547 555 565 569 573 575 586 603 609 612 627 654"
    " 656 660 661 665 670 671 675 690 705 717 734 751 757 779 802 803 817 820 829 847 864 866 867"
    " 870 874 880",
    "boat": "403 472 484 510 554 576 625 628 694 724 780 814 833 871 914",
    "aircraft or rocket": "404 405 417 657 701 744 812 895 908",
    "building": "425 437 442 449 483 497 498 500 525 538 580 624 634 649 663 668 682 698 727 743"
    " 762 821 832 839 853 858 873 888 900 915",
    "food": "924-957 959-969 987 998",
    "mushroom": "947 991-997",
    "flower": "984-986",
    "landscape": "970 972-980",
    "musical instrument": "401 402 420 432 486 494 513 541 546 558 566 577 579 593 594 641 642 683"
    " 684 687 699 776 822 875 881 889",
    "furniture": "431 453 493 495 516 520 526 532 559 564 703 765 831 857 894",
    "computer or phone": "487 508 527 590 605 620 664 673 681 782 851",
    "page or screen": "549 916-918 921 922",
    "ball game": "429 430 522 574 722 768 805 852 890 981",
}


def members(group: str) -> list[int]:
    """Returns the class numbers of a group, in the order in which they are listed."""
    numbers: list[int] = []
    for part in GROUPS[group].split():
        first, _, last = part.partition("-")
        numbers.extend(range(int(first), int(last or first) + 1))
    return numbers
